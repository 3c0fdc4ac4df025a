"""The value of a job that a sweeper of Hydra receives."""

import math
from pathlib import Path

import msgspec
import pytest

from harness.cli import JobResult, objective_value
from harness.metrics.difference import Difference
from harness.metrics.fidelity import Fidelity
from harness.records.record import RunFolder, Status
from tests.fixtures.records import record

ROW = Fidelity("fp_equivalent", [], Difference(0.01, 0.1), Difference(0.02, 0.2), 0.1, 0.1, "within_floor", "key")


def exit_code(folder: Path, bound: float | None, fidelity: Fidelity | None, state: str = "ok") -> float:
    run = RunFolder.claim(folder)
    row = record()
    config = row.config | {"task": {"max_pixel_error": bound}}
    run.write_record(msgspec.structs.replace(row, config=config, fidelity=fidelity))
    run.finish(Status(state))
    return objective_value(JobResult(folder, Status(state)))


@pytest.mark.parametrize(
    ("bound", "fidelity", "state", "bounded"),
    [
        (None, None, "ok", False),
        (0.03, ROW, "ok", False),
        (0.01, ROW, "ok", True),
        (0.03, None, "ok", True),
        (None, ROW, "failed", True),
    ],
)
def test_it_is_the_latency_at_a_bound(
    tmp_path: Path, bound: float | None, fidelity: Fidelity | None, state: str, bounded: bool
) -> None:
    expected = math.inf if bounded else record().summary.latency_ms.median
    assert exit_code(tmp_path, bound, fidelity, state) == expected


def test_a_job_without_a_record_is_worth_nothing(tmp_path: Path) -> None:
    assert objective_value(JobResult(tmp_path, Status("ok"))) == math.inf
