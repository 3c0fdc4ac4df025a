"""A tree of records as a table: which run a row is, what varies, long tables, and files of a table."""

import json
import math
import re
import sys
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pandas
import pytest
import yaml

import harness.records
from harness.messages import StageTime, StepTime
from harness.records import load, save
from harness.records.job import JobResult, write_sweep_job
from harness.records.record import RunFolder, RunFolderError, Status, read_started, read_status
from harness.records.table import one_type
from tests.fixtures.records import record, save_run, timed_record

PAGE = Path(harness.records.__file__).with_name("README.md")
IDENTITY = ["folder", "sweep", "job", "state", "error", "started_at", "wandb_id"]


def config(steps: int, **more: Any) -> dict[str, Any]:
    request = {"steps": steps, "prompts": ["rocket"]}
    return {"task": {"name": "bench"}, "request": request, "tags": [], "logger": {"table": False}} | more


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Four jobs: two solver step counts, one out of memory, one refused."""
    folder = tmp_path / "2026-11-30" / "10-00-00"
    for steps in (4, 8):
        times = [10.0 * steps + k for k in range(6)]
        save_run(folder / f"steps={steps}", timed_record(times, config(steps, logger={"table": steps > 4})))
    large = RunFolder.claim(folder / "steps=16")
    large.write_config(yaml.safe_dump(config(16, hardware={"name": "h100"})))
    large.finish(Status("oom", "out of memory"))
    save_run(folder / "steps=0", None, "failed")
    for number, steps in enumerate((4, 8, 16, 0)):
        job = folder / f"steps={steps}"
        write_sweep_job(JobResult(job, read_status(job), overrides=(job.name,)), folder, number)
    for name in ("offline-run-20261130_100000-old", "run-20261130_110000-ab-1", "latest-run"):
        (folder / "steps=4" / "wandb" / name).mkdir(parents=True)
    return folder


def test_a_row_begins_with_what_says_which_run_it_is(sweep: Path) -> None:
    before = datetime.now(UTC)
    table = load(sweep)
    assert list(table.columns[:7]) == IDENTITY
    table = table.sort_values("job")
    assert [Path(folder).name for folder in table["folder"]] == ["steps=4", "steps=8", "steps=16", "steps=0"]
    assert set(table["sweep"]) == {"2026-11-30-10-00-00"}
    assert list(table["job"]) == [0, 1, 2, 3]
    assert list(table["state"]) == ["ok", "ok", "oom", "failed"]
    assert list(table["wandb_id"].fillna("")) == ["ab-1", "", "", ""]
    assert list(table["started_at"][:2]) == [pandas.Timestamp("2026-11-30", tz="UTC")] * 2
    assert all((before - table["started_at"][2:]).dt.total_seconds().between(-60, 3600))
    assert list(table["config.request.steps"])[:3] == [4, 8, 16]  # of a run without a record too
    assert list(table["overrides"]) == [["request.steps=2"], ["request.steps=2"], ["steps=16"], ["steps=0"]]
    assert not [name for name in table if name.startswith("config.hardware")]


def test_what_is_not_known_is_missing(tmp_path: Path) -> None:
    older = msgspec.structs.replace(record(), provenance=msgspec.structs.replace(record().provenance, started=""))
    save_run(tmp_path / "2026-11-30" / "10-00-00", older)
    (tmp_path / "2026-11-30" / "10-00-00" / "status.json").write_text('{"state":"ok","error":null}')
    row = load(tmp_path).iloc[0]
    assert row["state"] == "ok"
    assert row[["sweep", "job", "error", "started_at", "wandb_id"]].isna().all()


def test_a_sweep_from_before_jobs_had_a_number_has_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "2026-11-30" / "10-00-00"
    save_run(folder / "steps=2", record())
    (folder / "multirun.yaml").write_text("")
    row = load(folder / "steps=2").iloc[0]
    assert row["sweep"] == "2026-11-30-10-00-00"
    assert row[["job"]].isna().all()


def test_the_sides_of_a_comparison_are_of_the_job_that_made_them(tmp_path: Path) -> None:
    save_run(tmp_path / "job" / "a", record())
    save_run(tmp_path / "job", None)
    write_sweep_job(JobResult(tmp_path / "job", Status("ok")), tmp_path, 5)
    assert list(load(tmp_path)["job"]) == [5, 5]


def test_a_job_of_another_command_keeps_its_number(tmp_path: Path) -> None:
    save_run(tmp_path, record())
    write_sweep_job(JobResult(tmp_path, Status("ok")), tmp_path.parent, 1)
    write_sweep_job(JobResult(tmp_path, Status("ok"), already_done=True), tmp_path.parent, 2)
    write_sweep_job(JobResult(tmp_path, Status("failed"), owns_folder=False), tmp_path.parent, 3)
    assert list(load(tmp_path)["job"]) == [1]


def test_a_status_says_when_the_folder_was_claimed_and_finished(tmp_path: Path) -> None:
    folder = RunFolder.claim(tmp_path)
    cut_off = json.loads((tmp_path / "status.json").read_text())
    folder.finish(Status("failed", "no"))
    written = json.loads((tmp_path / "status.json").read_text())
    assert (cut_off["finished"], cut_off["started"]) == ("", written["started"])
    assert datetime.fromisoformat(written["started"]) <= datetime.fromisoformat(written["finished"])
    assert read_started(tmp_path) == written["started"]


def test_an_interval_is_two_columns(sweep: Path) -> None:
    table = load(sweep)
    row = table[table["config.request.steps"] == 8].iloc[0]
    assert list(row[["summary.latency_ms.range_low", "summary.latency_ms.range_high"]]) == [80.0, 85.0]
    assert row["summary.latency_ms.ci95_low"] < row["summary.latency_ms.median"] < row["summary.latency_ms.ci95_high"]
    assert pandas.isna(row["summary.step_ms.ci95_low"])  # of two measurements there is none
    assert not [name for name in table if name.endswith((".ci95", ".range"))]


def test_a_varying_table_has_what_varies_and_what_was_measured(sweep: Path) -> None:
    wide, table = load(sweep), load(sweep, varying=True)
    assert [name for name in table if name.startswith(("config.", "provenance."))] == ["config.request.steps"]
    assert {name for name in wide if name.startswith("config.")} == {
        "config.task.name",
        "config.request.steps",
        "config.request.prompts",
        "config.tags",
        "config.logger.table",
    }
    assert list(table.columns[:7]) == IDENTITY
    assert {"fingerprint", "summary.latency_ms.median", "summary.nfe", "first_call.load_ms"} <= set(table)
    assert "summary.flops_per_step" not in table  # measured in no run
    assert not {"repeats", "samples", "notes", "overrides", "summary.peak_memory_mib"} & set(table)
    assert "config.request.steps" not in load(sweep / "steps=4", varying=True)


def test_the_users_own_keys_vary_and_None_is_a_value(tmp_path: Path) -> None:
    for name, tags, cache in (("a", ["x"], {"threshold": None}), ("b", ["y"], {"threshold": 0.1})):
        save_run(tmp_path / name, timed_record([1.0], config(4, tags=tags, cache=cache)))
    different = [name for name in load(tmp_path, varying=True) if name.startswith("config.")]
    assert different == ["config.tags", "config.cache.threshold"]


def test_long_tables_have_a_row_for_each_part(sweep: Path) -> None:
    repeats, stages, steps, images = (load(sweep, long=name) for name in ("repeats", "stages", "steps", "images"))
    for table in (repeats, stages, steps, images):
        assert list(table.columns[:8]) == [*IDENTITY, "config.request.steps"]
        assert set(table["config.request.steps"]) == {4, 8}
    assert list(repeats["total_duration_ms"][:6]) == [40.0, 41.0, 42.0, 43.0, 44.0, 45.0]
    assert list(repeats["repeat"]) == [*range(6)] * 2
    assert list(steps["step"]) == [0, 1] * 12
    assert list(images[["path", "seed"]].iloc[1]) == ["samples/0000.png", 0]
    totals = stages.groupby(["folder", "repeat"])["duration_ms"].sum()
    assert list(totals) == pytest.approx(list(repeats["total_duration_ms"]))
    assert list(stages["stage"][:2]) == ["denoising", "between_stages"]
    assert list(stages["used_mib"][:1]) == [100.0]


def test_a_long_table_of_an_unknown_kind_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^long='step' is none of repeats, stages, steps, images$"):
        load(tmp_path, long="step")  # type: ignore[arg-type]


def test_a_path_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="nowhere does not exist; give a folder with runs"):
        load(tmp_path / "nowhere")
    assert list(load(tmp_path)) == IDENTITY


def test_a_column_has_values_of_one_type() -> None:
    assert one_type([1, "inf", None]) == [1, math.inf, None]
    assert one_type([1, "auto", None]) == ["1", "auto", None]
    assert one_type([True, 2]) == ["true", "2"]
    assert one_type([[1], "a"]) == ["[1]", "a"]
    assert one_type([1, 2.5]) == [1, 2.5]


@pytest.mark.parametrize("name", ["table.csv", "table.json", "table.parquet"])
def test_a_saved_table_comes_back(sweep: Path, tmp_path: Path, name: str) -> None:
    if name.endswith("parquet") and find_spec("pyarrow") is None:
        pytest.skip("pyarrow is not installed")
    table, file = load(sweep), tmp_path / name
    save(table, file)
    read = {".csv": pandas.read_csv, ".json": pandas.read_json, ".parquet": pandas.read_parquet}[file.suffix](file)
    assert list(read) == list(table)
    assert list(read["summary.latency_ms.median"].dropna()) == list(table["summary.latency_ms.median"].dropna())
    assert list(pandas.to_datetime(read["started_at"])) == list(table["started_at"])
    assert [Path(folder).name for folder in read["folder"]] == [Path(folder).name for folder in table["folder"]]
    stored = read["repeats"].dropna().iloc[0]
    assert len(stored if isinstance(stored, list) else json.loads(stored)) == 6


def test_a_table_goes_to_parquet_by_pandas_too(sweep: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for number, table in enumerate((load(sweep), load(sweep, varying=True), load(sweep, long="stages"))):
        table.to_parquet(tmp_path / f"{number}.parquet")
        assert pandas.read_parquet(tmp_path / f"{number}.parquet")["job"].tolist() == table["job"].tolist()


def test_what_a_file_cannot_be_is_one_line(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"table\.xlsx has no format; give it one of the suffixes .csv, .json"):
        save(load(sweep), tmp_path / "table.xlsx")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'triptych\[parquet\]'"):
        save(load(sweep), tmp_path / "table.parquet")


def test_what_is_between_stages_is_a_column_of_repeats(tmp_path: Path) -> None:
    row = timed_record([5.0], config(4))
    stages, steps = [StageTime("denoising", 4.0)], [StepTime(0, 4.0)]
    bare = msgspec.structs.replace(row.repeats[0], steps=stages, denoise_steps_ms=steps)
    save_run(tmp_path, msgspec.structs.replace(row, repeats=[bare]))
    assert list(load(tmp_path, long="repeats")["between_stages_ms"]) == [1.0]


def test_the_page_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, factor in (("before", 1.1), ("after", 1.0)):
        for steps in (4, 8):
            times = [factor * (steps + k / 100) for k in range(8)]
            save_run(Path("sweeps", name, f"steps={steps}"), timed_record(times, config(steps)))
    Path("dumps").mkdir()
    steps = [{"step": 0, "duration_ms": 1.0}]
    dump = {"timestamp": "", "commit_hash": "", "tag": "", "total_duration_ms": 1.0, "steps": []}
    Path("dumps/flux.json").write_text(json.dumps(dump | {"denoise_steps_ms": steps}))
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert list(names["found"]["differs"]) == [True, True]
    assert len(names["images"]) == 4
    assert len(pandas.read_csv("table.csv")) == 4
