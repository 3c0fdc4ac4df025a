"""A trace has the record's own times, on one clock for all ranks, in the form that Perfetto opens."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from harness.client.generator import Generation
from harness.client.trace import merge_traces
from harness.device.trace import NoTrace, RankTrace
from harness.messages import GenerationResult, RankReport, StageTime
from harness.records.record import Record, RunFolder, RunFolderError, read_record
from harness.resolve.compose import compose_run
from harness.tasks import bench
from harness.tasks.common.session import TRACE, MeasurementSession
from tests.fixtures.faults import largest_file
from tests.fixtures.records import record

BENCH = ["task=bench", "task.warmup=0", "task.repeats=2", "task.fidelity=false", "task.trace=true"]
QUICK = ["request.prompt=rocket", "request.steps=2", "logger=json"]
HERE = ["launch.mode=inprocess", "launch.threads_per_rank=1"]
CPU = torch.device("cpu")


def events(trace: bytes) -> list[dict[str, Any]]:
    """Return the events of a trace, and check what the format asks of each."""
    found: list[dict[str, Any]] = json.loads(gzip.decompress(trace))["traceEvents"]
    named = {(event["pid"], event["tid"]) for event in found if event["name"] == "thread_name"}
    for event in found:
        if event["ph"] != "M":
            assert event["ts"] >= 0, event
            assert (event["pid"], event["tid"]) in named, event
        if event["ph"] == "X":
            assert event["dur"] >= 0, event
    return found


def ranges(found: list[dict[str, Any]], kind: str, rank: int = 0) -> list[dict[str, Any]]:
    return [event for event in found if event.get("cat") == kind and event["pid"] == rank]


def is_inside(event: dict[str, Any], outer: dict[str, Any]) -> bool:
    return bool(outer["ts"] <= event["ts"] and event["ts"] + event["dur"] <= outer["ts"] + outer["dur"])


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, list[dict[str, Any]]]:
    """Return the record of a traced run of one rank, and the events that it left."""
    folder = tmp_path_factory.mktemp("traced")
    bench.execute(compose_run([*BENCH, *QUICK, *HERE, f"hydra.run.dir={folder}"]), Console(quiet=True))
    found = read_record(folder)
    assert found is not None
    assert found.trace is not None
    return found, events((folder / found.trace.path).read_bytes())


def test_the_stages_of_a_trace_are_those_of_the_record(traced: tuple[Record, list[dict[str, Any]]]) -> None:
    found, all_events = traced
    assert found.trace is not None
    sums: dict[str, float] = {}
    for event in ranges(all_events, "stage"):
        sums[event["name"]] = sums.get(event["name"], 0.0) + event["dur"] / 1e3
    assert sums == pytest.approx({stage.name: stage.duration_ms for stage in found.trace.request.steps}, rel=0.01)
    assert {"text_encoding", "denoising", "decoding"} < set(sums)
    steps = [event["dur"] / 1e3 for event in ranges(all_events, "step")]
    assert steps == pytest.approx([step.duration_ms for step in found.trace.request.denoise_steps_ms], rel=0.01)


def test_operators_are_in_the_ranges_in_which_they_ran(traced: tuple[Record, list[dict[str, Any]]]) -> None:
    """The profiler's clock is another one than that of the ranges."""
    _, all_events = traced
    stages = {event["name"]: event for event in ranges(all_events, "stage")}
    networks, steps = ranges(all_events, "network"), ranges(all_events, "step")
    assert all(is_inside(step, stages["denoising"]) for step in steps)
    denoiser = [event for event in networks if event["name"] == "denoiser"]
    assert len(denoiser) == len(steps) == 2
    assert all(is_inside(*pair) for pair in zip(denoiser, steps, strict=True))
    products = [event for event in ranges(all_events, "cpu_op") if event["name"] == "aten::addmm"]
    assert len(products) > 2 * 4 * 6
    held = [any(is_inside(event, network) for network in networks) for event in products]
    assert sum(held) > 0.99 * len(held)
    convolutions = [event for event in ranges(all_events, "cpu_op") if event["name"] == "aten::convolution"]
    decoder = next(event for event in networks if event["name"] == "decoder")
    assert any(is_inside(event, decoder) for event in convolutions)


def test_the_traced_request_is_not_among_the_repeats(traced: tuple[Record, list[dict[str, Any]]]) -> None:
    found, _ = traced
    assert found.trace is not None
    assert len(found.repeats) == 2
    assert found.trace.request not in found.repeats
    first, second = (sum(stage.duration_ms for stage in repeat.steps) for repeat in found.repeats)
    own = sum(stage.duration_ms for stage in found.trace.request.steps)
    assert found.trace.overhead == pytest.approx(own / ((first + second) / 2) - 1)


def test_a_request_without_a_trace_has_none() -> None:
    nothing = NoTrace()
    nothing.add("stage", "denoising", 0.0, 1.0)
    assert nothing.encode() == nothing.memory_snapshot == b""
    with pytest.raises(ValueError, match="rank 1 left no trace"):
        merge_traces([report(0), report(1, b"")])


def report(rank: int, trace: bytes | None = None, ms: float = 1.0) -> RankReport:
    """Return the report of a rank whose trace has one range of a stage."""
    if trace is None:
        made = RankTrace(rank, 2, CPU, 0)
        made.add("stage", "denoising", 1e3 + rank, ms)
        trace = made.encode()
    return RankReport(rank, [StageTime("denoising", ms)], [], {}, {}, 0.0, [], [], trace=trace)


def test_ranks_are_processes_on_one_clock() -> None:
    found = events(merge_traces([report(0), report(1)]))
    names = [(event["pid"], event["args"]["name"]) for event in found if event["name"] == "process_name"]
    assert names == [(0, "rank 0"), (1, "rank 1")]
    first, second = (ranges(found, "stage", rank)[0] for rank in (0, 1))
    assert second["ts"] - first["ts"] == pytest.approx(1e3, abs=500)  # 1 ms; the clocks are read one after another


KERNELS = {
    "baseTimeNanoseconds": 5_000_000_000,
    "traceEvents": [
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "ts": 1.0, "args": {"name": "python"}},
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": 7, "ts": 1.0, "args": {"name": "stream 7"}},
        {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 2.5, "dur": 3.25, "args": {}},
        {"ph": "X", "cat": "cuda_runtime", "name": "launch", "pid": 41, "tid": 41, "ts": 2.0, "dur": 0.125, "args": {}},
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "id": 5, "pid": 41, "tid": 41, "ts": 2.0},
        {"ph": "f", "cat": "ac2g", "name": "ac2g", "id": 5, "pid": 0, "tid": 7, "ts": 2.5, "bp": "e"},
        {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler", "pid": "Spans", "tid": "x", "ts": 0, "dur": 9},
    ],
}


def test_kernels_are_on_tracks_of_their_rank(tmp_path: Path) -> None:
    """Every rank has a stream 7 and an arrow 5, and they are not the same ones."""
    (tmp_path / "operators.json").write_text(json.dumps(KERNELS))
    reports = []
    for rank in range(2):
        made = RankTrace(rank, 2, CPU, 1_000_000_000)
        made._add_operators(tmp_path / "operators.json")
        reports.append(report(rank, made.encode()))
    found = events(merge_traces(reports))
    for rank in range(2):
        (kernel,), (launch,) = ranges(found, "kernel", rank), ranges(found, "cuda_runtime", rank)
        assert (kernel["ts"], kernel["dur"], launch["ts"]) == (4_000_002.5, 3.25, 4_000_002.0)
        assert kernel["tid"] != launch["tid"]
        named = [event for event in found if event["name"] == "thread_name" and event["tid"] == kernel["tid"]]
        assert [event["args"]["name"] for event in named] == ["stream 7"] * 2
        assert len({event["id"] for event in ranges(found, "ac2g", rank)}) == 1
    assert len({event["id"] for event in found if "id" in event}) == 2
    assert not any(event["name"] == "PyTorch Profiler" for event in found)


def test_a_profiler_that_cannot_write_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "operators.json").write_text('{"traceEvents": [')  # what a full disk leaves
    with pytest.raises(ValueError, match="free some space there, or set TMPDIR"):
        RankTrace(0, 1, CPU, 0)._add_operators(tmp_path / "operators.json")


def test_a_trace_that_does_not_fit_on_the_disk_leaves_no_part(tmp_path: Path) -> None:
    made = record()
    result = GenerationResult("", [], [report(0, ms=3.0), report(1, ms=6.0)], 10.0)
    session = MeasurementSession(None, Progress(disable=True))  # type: ignore[arg-type]
    session.generator = _Generator()  # type: ignore[assignment]
    session._traced = Generation([], result, 1.0, 1, lambda: made, made.repeats[0])
    session.repeats = made.repeats
    folder = RunFolder.claim(tmp_path / "run")
    before = sorted(folder.path.rglob("*"))
    with largest_file(50), pytest.raises(RunFolderError, match=rf"{TRACE} cannot be written \(File too large\)"):
        session.save_trace(made, folder)
    assert sorted(folder.path.rglob("*")) == before
    row = session.save_trace(made, folder).trace
    assert row is not None
    assert (row.rank, row.path, row.memory_snapshots) == (1, TRACE, [])
    assert len(ranges(events((folder.path / TRACE).read_bytes()), "stage", 1)) == 1


class _Generator:
    """A generator of which only the configuration is read."""

    info = None
    config = compose_run([]).config


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_shows_kernels_and_its_memory() -> None:
    device = torch.device("cuda")
    made = RankTrace(0, 1, device, 0)
    with made.recording(lambda: None), made.nvtx("product"):
        x = torch.randn(512, 512, device=device)
        (x @ x).sum().item()
    kernels = ranges(events(merge_traces([report(0, made.encode())])), "kernel")
    assert any("gemm" in event["name"] for event in kernels)
    assert made.memory_snapshot
