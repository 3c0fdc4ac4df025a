"""A record's rows: the stages and what is between them sum to the request, and the first solver step is apart."""

import io
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from harness.client.build_record import base_record, make_repeat, summarize_repeats
from harness.loggers.table import print_record
from harness.messages import ArrayRef, EngineInfo, GenerationResult, RankReport, SampleResult, StageTime, StepTime
from harness.records.comparison import times_by_name
from harness.records.provenance import Beginning
from harness.records.record import FirstCall, Repeat, Statistics
from harness.resolve.compose import compose_run
from tests.fixtures.records import record


def answer(total_ms: float, steps_ms: list[float], text_ms: float = 5.0) -> GenerationResult:
    """Return an answer of one rank with a text stage and a denoising stage."""
    report = RankReport(
        rank=0,
        stages=[StageTime("text", text_ms), StageTime("denoising", sum(steps_ms))],
        denoise_steps_ms=[StepTime(number, ms) for number, ms in enumerate(steps_ms)],
        networks_ms={"denoiser": sum(steps_ms)},
        network_evaluations={"denoiser": len(steps_ms)},
        peak_memory_mib=1.0,
        memory_checkpoints=[],
        notes=[],
    )
    return GenerationResult("a", [SampleResult(0, "rocket", 0, ArrayRef(1, "float32", (1,)))], [report], total_ms)


def statistics(*answers: GenerationResult, even: bool = True, counted: bool = False) -> Statistics:
    """Return the statistics of answers as repeats."""
    if counted:
        report = msgspec.structs.replace(answers[0].ranks[0], flops={"denoiser": 10**12})
        flops = msgspec.structs.replace(answers[0], ranks=[report])
        return summarize_repeats(repeats(*answers), answers, 1, flops_result=flops, even=even)
    return summarize_repeats(repeats(*answers), answers, 1, even=even)


def repeats(*answers: GenerationResult) -> list[Repeat]:
    """Return answers as repeats; each client waits 1 ms longer than the ranks work."""
    return [make_repeat(each, each.total_duration_ms + 1) for each in answers]


def test_the_rows_of_a_repeat_sum_to_its_request() -> None:
    found = statistics(answer(50.0, [30.0, 10.0]))
    assert {name: row.median for name, row in found.stage_ms.items()} == {
        "text": 5.0,
        "denoising": 40.0,
        "between_stages": 5.0,
    }
    assert sum(row.median for row in found.stage_ms.values()) == found.latency_ms.median == 50.0


def test_the_first_solver_step_is_apart() -> None:
    """A slow first step once made the interval of a step of 14 ms reach from -579 to 607 ms."""
    found = statistics(*(answer(800.0, [700.0 + k, 13.0, 14.0, 15.0]) for k in range(5)))
    assert found.first_step_ms is not None
    assert (found.first_step_ms.median, found.first_step_ms.n) == (702.0, 5)
    assert (found.step_ms.median, found.step_ms.n) == (14.0, 15)
    assert found.step_ms.ci95 is not None
    assert 13 <= found.step_ms.ci95[0] <= 14 <= found.step_ms.ci95[1] <= 15
    only = statistics(answer(30.0, [20.0]))
    assert (only.first_step_ms, only.step_ms.median) == (None, 20.0)
    times = times_by_name(repeats(answer(800.0, [700.0, 13.0, 15.0])))
    assert times["step"] == [14.0]
    assert times["between_stages"] == [800.0 - 5.0 - 728.0]


def test_a_rate_is_of_the_steps_that_it_names() -> None:
    """Of a median step if all are alike, else over all steps, the first too: 1 TFLOP in 4 steps."""
    slow_first = answer(100.0, [20.0, 10.0, 10.0, 10.0])
    assert statistics(slow_first, counted=True).achieved_tflops == pytest.approx(0.25 / 10e-3)
    assert statistics(slow_first, counted=True, even=False).achieved_tflops == pytest.approx(0.25 / 12.5e-3)


def test_the_table_calls_a_range_a_range() -> None:
    def shown(count: int) -> str:
        answers = [answer(50.0 + k, [30.0, 10.0]) for k in range(count)]
        console = Console(file=io.StringIO(), width=160)
        print_record(msgspec.structs.replace(record(), summary=statistics(*answers)), Path(), console)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    three, five = shown(3), shown(5)
    assert "95 %" not in three
    assert "50.00 .. 52.00" in three
    assert three.count("range") >= len(("heading", "text", "denoising", "between stages", "first", "step", "request"))
    assert "94 %" in five
    for row in ("between stages", "first solver step", "one solver step"):
        assert row in three


def test_a_record_has_the_beginning_of_its_run_and_no_planned_hardware() -> None:
    run, beginning = compose_run([]), Beginning("2026-11-30T00:00:00+00:00", ["triptych"], "0123456789abcdef")
    found = base_record(run, EngineInfo("ready", 1, [1], cpu_capability="AVX2"), {}, FirstCall(0.0, 0.0, []), beginning)
    assert "hardware" not in found.config
    assert {"model", "request", "task"} <= set(found.config)
    own = found.provenance
    assert (own.started, own.command, own.sources_sha256) == (
        "2026-11-30T00:00:00+00:00",
        ["triptych"],
        "0123456789abcdef",
    )
    assert own.ended > own.started
    assert own.machine[1] == "AVX2"
