"""The record says where a network's time goes, for every engine, and only if the profile is enabled."""

from pathlib import Path

import pytest
from rich.console import Console

from harness.client.build_record import operators
from harness.messages import GenerationResult, OperatorTime, RankReport, StageTime
from harness.records.record import Record, read_record
from harness.resolve.compose import compose_run
from harness.tasks import bench
from tests.fixtures.records import assert_valid

BENCH = ["task=bench", "task.repeats=1", "task.fidelity=false", "launch.mode=inprocess", "launch.threads_per_rank=1"]
REQUESTED = ["request.prompt=rocket", "request.steps=2", "logger=json", "logger.table=false"]


def ran(folder: Path, *overrides: str) -> Record:
    composed = compose_run([*BENCH, *REQUESTED, *overrides, f"hydra.run.dir={folder}"])
    bench.execute(composed, Console(quiet=True))
    record = read_record(folder)
    assert record is not None
    return record


@pytest.mark.parametrize("engine", ["native", "diffusers"])
def test_linears_and_convolutions_are_where_the_time_goes(engine: str, tmp_path: Path) -> None:
    record = ran(tmp_path, "task.profile=true", f"engine={engine}")
    assert set(record.profile) == {"text_encoder", "denoiser", "decoder"}
    names = [row.name for row in record.profile["denoiser"]]
    assert "aten::addmm" in names[:3]
    assert any("conv" in row.name for row in record.profile["decoder"][:3])
    blocks = 6
    assert next(row.calls for row in record.profile["denoiser"] if row.name == "aten::addmm") >= 2 * 4 * blocks
    assert len(record.repeats) == 1  # the profiled repeat is not among the measured ones
    assert_valid(tmp_path)


def test_nothing_is_profiled_by_default(tmp_path: Path) -> None:
    assert ran(tmp_path).profile == {}


def report(rank: int, ms: float, parts: list[OperatorTime]) -> RankReport:
    return RankReport(rank, [StageTime("denoising", ms)], [], {}, {}, 0.0, [], [], operators={"denoiser": parts})


def test_the_slowest_rank_is_reported_by_operator() -> None:
    many = [OperatorTime(f"op{number}", 1, float(number)) for number in range(30)]
    slow = report(1, 9.0, [*many, OperatorTime("op29", 2, 1.0)])
    result = GenerationResult("", [], [report(0, 1.0, []), slow], 0.0)
    rows = operators(result)["denoiser"]
    assert rows[0] == OperatorTime("op29", 3, 30.0)
    assert (len(rows), rows[-1].name) == (21, "others")
    assert rows[-1] == OperatorTime("others", 9, sum(range(1, 10)))  # op0 took no time
    assert sum(row.self_ms for row in rows) == sum(range(30)) + 1
