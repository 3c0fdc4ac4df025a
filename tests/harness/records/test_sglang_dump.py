"""Performance dumps of SGLang-Diffusion are rows with what they hold; another shape is one line that names the file."""

import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from harness.records import compare, load
from harness.records.record import RunFolderError
from tests.fixtures.records import record, save_run

SNAPSHOT = {"allocated_mb": 900.0, "reserved_mb": 1200.0, "peak_allocated_mb": 1000.0, "peak_reserved_mb": 1500.0}


def dump(total_ms: float = 100.0, **more: Any) -> dict[str, Any]:
    """Return what `sglang generate --perf-dump-path` writes, in 0.5.23."""
    return {
        "timestamp": "2026-11-30T10:00:00.123456+00:00",
        "request_id": "mocked_fake_id_for_offline_generate",
        "commit_hash": "0017ffd3",
        "tag": "cli_generate",
        "total_duration_ms": total_ms,
        "steps": [
            {"name": "TextEncodingStage", "duration_ms": 20.0},
            {"name": "DenoisingStage", "duration_ms": 70.0},
        ],
        "denoise_steps_ms": [{"step": 0, "duration_ms": 30.0}, *({"step": k, "duration_ms": 20.0} for k in (1, 2))],
        "memory_checkpoints": {
            "after_TextEncodingStage": {**SNAPSHOT, "peak_host_anon_mb": 1.0},
            "after_DenoisingStage": {**SNAPSHOT, "peak_allocated_mb": 1024.0},
        },
        "meta": {"prompt": "a red fox", "model": "black-forest-labs/FLUX.1-dev"},
    } | more


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))
    return path


def test_a_dump_is_a_row_beside_the_records(tmp_path: Path) -> None:
    save_run(tmp_path / "run", record())
    file = write(tmp_path / "flux" / "perf.json", dump())
    table = load(tmp_path)
    assert list(table["folder"]) == [str(file), str(tmp_path / "run")]
    row = table.iloc[0]
    known = {name: value for name, value in row.items() if isinstance(value, list) or not pandas.isna(value)}
    repeats = known.pop("repeats")
    assert known.pop("provenance.timing").startswith("SGLang's own clock")
    assert known == {
        "folder": str(file),
        "state": "ok",
        "summary.latency_ms.n": 1,
        "summary.latency_ms.median": 100.0,
        "summary.latency_ms.mean": 100.0,
        "summary.step_ms.n": 2,
        **dict.fromkeys([f"summary.step_ms.{name}" for name in STEP_NAMES], 20.0),
        "summary.step_ms.iqr": 0.0,
        **{f"summary.stage_ms.{name}": value for name, value in STAGES.items()},
        "summary.peak_memory_mib_max": 1024.0,
        "engine.name": "sglang (dump)",
        "engine.version": "0017ffd3",
        "config.model.path": "black-forest-labs/FLUX.1-dev",
        "config.request.prompts": ["a red fox"],
        "provenance.ended": "2026-11-30T10:00:00.123456+00:00",
    }
    assert repeats[0]["total_duration_ms"] == 100.0
    assert len(load(file)) == 1


STEP_NAMES = ("median", "mean", "p90", "p99", "range_low", "range_high")
STAGES = {
    f"{stage}Stage.{name}": value
    for stage, time in (("TextEncoding", 20.0), ("Denoising", 70.0))
    for name, value in (("n", 1), ("median", time), ("mean", time))
}


def test_a_dump_has_rows_in_the_long_tables(tmp_path: Path) -> None:
    write(tmp_path / "perf.json", dump())
    assert list(load(tmp_path, long="repeats")["total_duration_ms"]) == [100.0]
    assert list(load(tmp_path, long="stages")["stage"]) == ["TextEncodingStage", "DenoisingStage"]
    assert list(load(tmp_path, long="steps")["duration_ms"]) == [30.0, 20.0, 20.0]
    assert len(load(tmp_path, long="images")) == 0


def test_dumps_of_older_and_newer_versions_with_the_same_meaning_are_read(tmp_path: Path) -> None:
    older = dump(denoise_steps_ms=[], commit_hash="N/A", meta={})
    del older["memory_checkpoints"], older["request_id"]
    write(tmp_path / "older.json", older)
    server = {"meta": {"model": "m"}, "cache_stats": {"x": 1}, "tag": "server_perf_dump"}
    write(tmp_path / "newer.json", dump(memory_checkpoints={}, **server))
    table = load(tmp_path)
    assert list(table["state"]) == ["ok", "ok"]
    assert list(table["engine.version"]) == ["0017ffd3", ""]
    assert list(table["config.model.path"].fillna("-")) == ["m", "-"]
    assert list(table["summary.step_ms.median"].fillna(-1)) == [20.0, -1.0]
    assert "summary.peak_memory_mib_max" not in table


OTHERS = {
    "seconds": {"total_duration_ms": None, "total_duration_s": 0.1},
    "steps by name": {"steps": {"DenoisingStage": 70.0}},
    "steps as numbers": {"denoise_steps_ms": [30.0, 20.0]},
    "no commit": {"commit_hash": None},
    "no time": {"total_duration_ms": 0},
    "a text": {"total_duration_ms": "100 ms"},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_another_shape_is_one_line_and_no_measurement(tmp_path: Path, changes: dict[str, Any]) -> None:
    content = {name: value for name, value in dump(**changes).items() if value is not None}
    file = write(tmp_path / "perf.json", content)
    with pytest.raises(RunFolderError) as raised:
        load(file)
    assert str(raised.value).startswith(f"{file}: not a performance dump of SGLang-Diffusion as 0.5.23 writes it (")
    assert str(raised.value).isprintable()
    row = load(tmp_path).iloc[0]
    assert (row["state"], row["error"]) == ("unreadable", str(raised.value))
    assert "summary.latency_ms.median" not in row


def test_other_json_files_are_no_rows(tmp_path: Path) -> None:
    save_run(tmp_path / "run", record())
    write(tmp_path / "run" / "perf.json", dump())  # in a run's folder, which is that run's
    write(tmp_path / "run" / "samples" / "x" / "perf.json", dump())
    write(tmp_path / "baselines.json", {"scenarios": {"flux": {"stages_ms": {}, "denoise_step_ms": {}}}})
    write(tmp_path / "list.json", [dump()])
    (tmp_path / "text.json").write_text("{")
    assert list(load(tmp_path)["folder"]) == [str(tmp_path / "run")]
    with pytest.raises(RunFolderError, match=r"list\.json is no performance dump of SGLang-Diffusion; give a folder"):
        load(tmp_path / "list.json")


def test_a_dump_matches_a_record_only_by_keys_that_are_given(tmp_path: Path) -> None:
    for k in range(5):
        write(tmp_path / "a" / f"{k}.json", dump(20.0 + k, meta={"prompt": "rocket"}))
    save_run(tmp_path / "b", record(10.0))
    with pytest.raises(ValueError, match="no configuration is in both"):
        compare(tmp_path / "a", tmp_path / "b")
    found = compare(tmp_path / "a", tmp_path / "b", on=["request.prompts"])
    assert list(found["ratio"]) == [2.2]
    assert list(found["repeats_a"]) == [5]
