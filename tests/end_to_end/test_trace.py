"""A trace of two ranks: both are there, and what they did together is at one time in both."""

import gzip
import json
from pathlib import Path

import pytest

from tests.fixtures.commands import command, record_of, run

TRACED = ["task=bench", "task.warmup=0", "task.repeats=1", "task.fidelity=false", "task.trace=true"]


@pytest.mark.slow
def test_a_collective_overlaps_itself_on_the_other_rank(tmp_path: Path) -> None:
    """No rank leaves an exchange before the other one has entered it, so another order is a wrong clock."""
    done = run(command(*TRACED, "request.prompt=rocket", "parallel=ulysses2", f"hydra.run.dir={tmp_path / 'run'}"))
    assert done.returncode == 0, done.stderr
    row = record_of(tmp_path / "run").trace
    assert row is not None
    events = json.loads(gzip.decompress((tmp_path / "run" / row.path).read_bytes()))["traceEvents"]
    stages = [event for event in events if event.get("cat") == "stage" and event["pid"] == row.rank]
    total_ms = sum(stage.duration_ms for stage in row.request.steps)
    assert sum(stage["dur"] for stage in stages) / 1e3 == pytest.approx(total_ms, rel=0.01)
    first, second = (
        [event for event in events if event.get("cat") == "collective" and event["pid"] == rank] for rank in (0, 1)
    )
    assert [event["name"] for event in first] == [event["name"] for event in second]
    assert sum(event["name"] == "all_to_all" for event in first) > 10
    for mine, other in zip(first, second, strict=True):
        assert mine["ts"] < other["ts"] + other["dur"], (mine, other)
        assert other["ts"] < mine["ts"] + mine["dur"], (mine, other)
