"""Two trees side by side: a planted factor is found, a tree does not differ from itself, and all runs are named."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas
import pytest

from harness.records import compare, load
from harness.records.record import RunFolderError
from tests.fixtures.records import save_run, timed_record

SOLVERS = ("euler", "heun", "dpmpp")


def config(solver: str, steps: int, **more: Any) -> dict[str, Any]:
    return {
        "task": {"name": "bench", "repeats": 8},
        "scheduler": {"solver": {"name": solver}},
        "request": {"steps": steps},
        "engine": {"name": "native"},
        "launch": {"reuse": 1, "threads": 2},
        "logger": {"table": True},
    } | more


def plant(folder: Path, factor: float, seed: int, repeats: int = 8, **more: Any) -> Path:
    """Write a sweep of three solvers at two step counts, whose repeats scatter by 1 %."""
    random = np.random.default_rng(seed)
    for solver in SOLVERS:
        for steps in (4, 8):
            times = factor * steps * 10 * random.lognormal(0, 0.01, size=repeats)
            save_run(folder / f"{solver}{steps}", timed_record(times.tolist(), config(solver, steps, **more)))
    return folder


def test_a_planted_tenth_is_found_in_every_configuration(tmp_path: Path) -> None:
    found = compare(plant(tmp_path / "a", 1.1, seed=1), plant(tmp_path / "b", 1.0, seed=2))
    assert list(found.columns[:3]) == ["config.scheduler.solver.name", "config.request.steps", "match"]
    assert len(found) == 6
    assert set(found["match"]) == {"both"}
    assert found["differs"].all()
    assert found["ratio"].between(1.08, 1.12).all()
    assert (found["ratio_low"] < 1.1).all()
    assert (found["ratio_high"] > 1.1).all()
    assert list(found["level"]) == pytest.approx([1 - 0.05 / 6] * 6)
    assert (found["repeats_a"] == 8).all()
    assert found["same_machine"].all()


def test_a_sweep_does_not_differ_from_itself_nor_from_one_more_like_it(tmp_path: Path) -> None:
    a, b = plant(tmp_path / "a", 1.0, seed=1), plant(tmp_path / "b", 1.0, seed=2)
    assert not compare(a, a)["differs"].any()
    assert (compare(a, a)["ratio"] == 1).all()
    assert not compare(a, b)["differs"].any()


def test_equal_sweeps_differ_in_at_most_one_of_twenty_comparisons(tmp_path: Path) -> None:
    config_of = {steps: config("euler", steps) for steps in range(5)}
    wrong = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        sides = [frame({steps: random.lognormal(0, 0.02, 8) for steps in config_of}, config_of) for _ in "ab"]
        wrong += bool(compare(*sides)["differs"].any())
    assert wrong <= 4  # of 20 sweeps, one is expected


def frame(times: Mapping[int, Any], configs: Mapping[int, dict[str, Any]]) -> pandas.DataFrame:
    """Return what `load` returns of some runs."""
    rows = [
        {
            "folder": str(steps),
            "state": "ok",
            "config.request.steps": configs[steps]["request"]["steps"],
            "repeats": [{"total_duration_ms": float(time)} for time in values],
        }
        for steps, values in times.items()
    ]
    return pandas.DataFrame(rows)


def test_what_does_not_match_is_a_row_too(tmp_path: Path) -> None:
    a, b = plant(tmp_path / "a", 1.0, seed=1), plant(tmp_path / "b", 1.0, seed=2)
    save_run(a / "more", timed_record([1.0] * 8, config("euler", 16)))
    save_run(b / "failed", timed_record([1.0] * 8, config("euler", 32)), "failed")
    save_run(a / "ok", timed_record([1.0] * 8, config("euler", 32)))
    found = compare(a, b).set_index(["config.scheduler.solver.name", "config.request.steps"])
    assert found["match"].value_counts().to_dict() == {"both": 7, "a": 1}
    alone, failed = found.loc["euler", 16], found.loc["euler", 32]
    assert (alone["state_b"], alone["folders_a"], alone["folders_b"]) == ("", [str(a / "more")], [])
    assert (failed["state_a"], failed["state_b"]) == ("ok", "failed")
    assert pandas.isna(alone["ratio"])
    assert pandas.isna(failed["ratio"])
    assert pandas.isna(failed["differs"])


def test_keys_that_differ_on_purpose_are_left_out_and_nothing_else(tmp_path: Path) -> None:
    a = plant(tmp_path / "a", 2.0, seed=1, engine={"name": "diffusers"}, attention={"backend": "sdpa"})
    b = plant(tmp_path / "b", 1.0, seed=2, engine={"name": "native"}, attention={"backend": "math"})
    with pytest.raises(ValueError, match=r"all runs differ in engine\.name, attention\.backend; ignore=\[\.\.\.\]"):
        compare(a, b)
    with pytest.raises(ValueError, match=r"all runs differ in attention\.backend;"):
        compare(a, b, ignore=["engine"])
    for found in (compare(a, b, ignore=["engine", "config.attention.backend"]), compare(a, b, on=KEYS)):
        assert len(found) == 6
        assert found["ratio"].between(1.9, 2.1).all()
    with pytest.raises(ValueError, match="ignore='engines' is no key"):
        compare(a, b, ignore=["engines"])
    with pytest.raises(ValueError, match=r"on='scheduler\.sovler' is no column"):
        compare(a, b, on=["scheduler.sovler"])


KEYS = ["scheduler.solver.name", "request.steps"]


def test_what_changes_neither_image_nor_time_may_differ(tmp_path: Path) -> None:
    a = plant(tmp_path / "a", 1.0, seed=1, logger={"table": False}, launch={"reuse": 0, "threads": 2}, tags=["x"])
    assert set(compare(a, plant(tmp_path / "b", 1.0, seed=2))["match"]) == {"both"}
    with pytest.raises(ValueError, match=r"differ in launch\.threads"):
        compare(a, plant(tmp_path / "c", 1.0, seed=2, launch={"reuse": 0, "threads": 1}))


def test_too_few_repeats_have_a_ratio_and_no_interval(tmp_path: Path) -> None:
    a, b = plant(tmp_path / "a", 1.1, seed=1, repeats=3), plant(tmp_path / "b", 1.0, seed=2)
    found = compare(a, b)
    assert found["ratio"].between(1.05, 1.15).all()
    assert found[["ratio_low", "ratio_high", "level", "differs"]].isna().all(axis=None)


def test_several_runs_of_a_configuration_are_one_sample_of_runs(tmp_path: Path) -> None:
    for run, factor in enumerate((0.9, 1.0, 1.1, 1.2)):
        plant(tmp_path / "a" / str(run), factor, seed=run)
    b = plant(tmp_path / "b", 1.0, seed=9)
    one, several = compare(tmp_path / "a" / "3", b), compare(tmp_path / "a", b)
    assert one["differs"].all()
    assert not several["differs"].any()  # the runs themselves differ by more
    assert (several["repeats_a"] == 32).all()


def test_tables_may_be_given_and_hold_some_rows(tmp_path: Path) -> None:
    a, b = load(plant(tmp_path / "a", 1.1, seed=1)), load(plant(tmp_path / "b", 1.0, seed=2))
    found = compare(a[a["config.request.steps"] == 4], b)
    assert found["match"].value_counts().to_dict() == {"both": 3, "b": 3}
    assert found[found["match"] == "both"]["differs"].all()
    with pytest.raises(ValueError, match="a table without repeats cannot be compared"):
        compare(a.drop(columns="repeats"), b)


def test_another_machine_and_other_code_are_columns(tmp_path: Path) -> None:
    row = timed_record([1.0] * 8, config("euler", 4))
    hardware = msgspec.structs.replace(row.provenance.hardware, cpu="another")
    other = msgspec.structs.replace(row.provenance, hardware=hardware, sources_sha256="other")
    save_run(tmp_path / "a", row)
    save_run(tmp_path / "b", msgspec.structs.replace(row, provenance=other))
    assert list(compare(tmp_path / "a", tmp_path / "b")[["same_machine", "same_code"]].iloc[0]) == [False, False]


def test_nothing_to_compare_is_one_line(tmp_path: Path) -> None:
    a = plant(tmp_path / "a", 1.0, seed=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there are 6 runs in a and 0 in b"):
        compare(a, tmp_path / "empty")
    with pytest.raises(RunFolderError, match="does not exist"):
        compare(a, tmp_path / "nowhere")
