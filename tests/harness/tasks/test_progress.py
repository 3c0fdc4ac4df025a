"""What is seen while a run works: lines where there is no terminal, what a sweep has left, and a closed pipe."""

import io
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from harness.config.schema import LoggerConfig, LogLevel, ProgressMode
from harness.loggers.level import set_log_level
from harness.records.job import JobResult
from harness.records.record import Status
from harness.tasks.common import progress
from harness.tasks.common.progress import SweepProgress, progress_bars, shows_bars, shows_lines
from harness.tasks.common.terminal import output_console
from tests.fixtures.commands import environment

TERMINAL, FILE, QUIET = Console(force_terminal=True), Console(file=io.StringIO()), Console(quiet=True)


def test_bars_are_for_terminals_and_lines_for_everything_else() -> None:
    auto, lines, none = ProgressMode.auto, ProgressMode.lines, ProgressMode.none
    assert [shows_bars(TERMINAL, mode) for mode in (auto, lines, none)] == [True, False, False]
    assert [shows_lines(TERMINAL, mode) for mode in (auto, lines, none)] == [False, True, False]
    assert [shows_bars(FILE, mode) for mode in (auto, lines, none)] == [False] * 3
    assert [shows_lines(FILE, mode) for mode in (auto, lines, none)] == [True, True, False]
    assert not shows_lines(QUIET, lines)


def test_a_line_says_what_is_done_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "INTERVAL_S", 0.01)
    said = ""
    with progress_bars(FILE) as bars:
        task = bars.add_task("starting ranks", total=None)
        while "starting ranks; 0 s\n" not in said:
            said += capsys.readouterr().err
        bars.update(task, description="generating 2 of 5: denoising [x]", completed=7, total=20)
        while "triptych: generating 2 of 5: denoising [x], 7 done, 13 left; 0 s\n" not in said:
            said += capsys.readouterr().err
        bars.remove_task(task)
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == ""  # the thread has ended


def test_a_run_without_progress_prints_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "INTERVAL_S", 0.01)
    with progress_bars(FILE, ProgressMode.none) as bars:
        bars.add_task("starting ranks", total=None)
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


def finished_job(*overrides: str, done: bool = False) -> JobResult:
    return JobResult(Path("a"), Status("ok"), already_done=done, overrides=overrides)


def test_each_job_of_a_sweep_is_a_line_with_what_varies_and_what_is_left() -> None:
    sweep = SweepProgress.of(["scheduler/solver=euler,heun", "request.steps=range(1,4)", "logger=json"])
    assert (sweep.keys, sweep.total) == (("scheduler/solver", "request.steps"), 6)
    own = ("logger=json", "request.steps=1", "scheduler/solver=heun")
    sweep = SweepProgress(sweep.keys, sweep.total, time.time() - 20)
    assert (
        sweep.line(finished_job(*own), 1, 2)
        == "job 2 of 6: ok, request.steps=1, scheduler/solver=heun; 4 left, about 40 s"
    )
    assert sweep.line(finished_job(*own, done=True), 5, 6).startswith("job 6 of 6: done before, request.steps=1")
    assert "left" not in sweep.line(finished_job(*own), 5, 6)
    assert "left" not in sweep.line(finished_job(*own), 3, 1)  # of a process that has not seen the others


@pytest.mark.parametrize("search", [["hydra/sweeper=optuna", "request.steps=choice(1,2)"], ["model=glob(*)"]])
def test_a_sweep_of_unknown_length_has_no_total(search: list[str]) -> None:
    assert SweepProgress.of(search).total is None


def test_the_level_of_logs_is_the_configured_one() -> None:
    root = logging.getLogger()
    before = root.level
    try:
        set_log_level(LoggerConfig(level=LogLevel.warning))
        assert not logging.getLogger("harness.engines.rank").isEnabledFor(logging.INFO)
        set_log_level(LoggerConfig(level=LogLevel.debug))
        assert logging.getLogger("harness.engines.rank").isEnabledFor(logging.DEBUG)
    finally:
        root.setLevel(before)


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["request.height=65"], 2)])
def test_a_reader_that_leaves_is_no_error(arguments: list[str], status: int) -> None:
    """As with `| head -1`: nothing is printed about it, and the status is the usual one."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "harness", *arguments],
            stdout=writing,
            stderr=subprocess.PIPE if status == 0 else writing,
            timeout=120,
            env=environment(),
        )
    finally:
        os.close(writing)
    assert done.returncode == status
    assert not done.stderr


def test_a_line_of_results_is_whole_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    long = "word " * 40
    output_console().print(long)
    assert capsys.readouterr().out.splitlines() == [long]
