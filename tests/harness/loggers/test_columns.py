"""Tables of jobs: a column for each key that varies, and no name of a layout that is cut in 80 columns."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from harness.loggers.columns import varying_values
from harness.loggers.table import print_sweep
from harness.records.job import JobResult, read_jobs, write_job
from harness.records.record import RunFolder, Status
from harness.resolve.names import config_groups
from tests.fixtures.records import record

LAYOUTS = config_groups()["parallel"]


def job(folder: Path, *overrides: str, latency_ms: float | None = None, error: str | None = None) -> JobResult:
    """Return a job with these overrides, and a record if it has a time."""
    name = folder / ",".join(overrides).replace("/", ".")
    if latency_ms is not None:
        run = RunFolder.claim(name)
        run.write_record(record(latency_ms=latency_ms))
        run.finish(Status("ok"))
    return JobResult(name, Status("failed", error) if error else Status("ok"), overrides=overrides)


def shown(jobs: list[JobResult], is_terminal: bool = True, width: int = 80) -> str:
    """Return what is printed, without colours."""
    console = Console(file=io.StringIO(), record=True, width=width, force_terminal=is_terminal)
    print_sweep(jobs, console)
    assert console.width == width
    return console.export_text()


def test_a_key_that_varies_is_a_column_and_one_that_does_not_is_none(tmp_path: Path) -> None:
    common = ("request.prompt=rocket", "logger=json")
    jobs = [
        job(tmp_path, f"scheduler/solver={s}", f"request.steps={n}", *common) for s in ("euler", "heun") for n in (4, 8)
    ]
    assert varying_values(jobs) == {
        "scheduler/solver": ["euler", "euler", "heun", "heun"],
        "request.steps": ["4", "8", "4", "8"],
    }
    head, _, first, *_ = [re.findall(r"[\w.]+", line) for line in shown(jobs).splitlines()]
    assert head == ["solver", "steps", "state"]
    assert first == ["euler", "4", "ok"]
    assert "rocket" not in shown(jobs).partition("folders in")[0]


def test_keys_of_one_last_part_are_written_whole(tmp_path: Path) -> None:
    jobs = [job(tmp_path, f"model.text.tokens={n}", f"serve.tokens={n}") for n in (1, 2)]
    assert re.findall(r"[\w.]+", shown(jobs))[:2] == ["model.text.tokens", "serve.tokens"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_no_layout_is_cut_in_80_columns(tmp_path: Path, is_terminal: bool) -> None:
    overrides = [
        (f"parallel={name}", f"attention={'sdpa' * (1 + k % 2)}", f"request.steps={k}")
        for k, name in enumerate(LAYOUTS)
    ]
    jobs = [job(tmp_path, *each, latency_ms=123456.7) for each in overrides]
    text = shown(jobs, is_terminal)
    rows = [line.split() for line in text.splitlines()]
    assert [row[0] for row in rows[2 : 2 + len(LAYOUTS)]] == LAYOUTS
    assert text.count("123456.7") >= len(LAYOUTS)
    assert "…" not in text


def test_a_narrow_terminal_cuts_no_number(tmp_path: Path) -> None:
    jobs = [job(tmp_path, f"parallel={name}", f"request.prompt={name * 9}", latency_ms=123456.7) for name in LAYOUTS]
    assert shown(jobs, width=30).count("123456.7") >= len(LAYOUTS)


def test_a_value_is_shown_as_text_and_brackets_as_they_are(tmp_path: Path) -> None:
    jobs = [job(tmp_path, f'request.prompt="{text}"', error="no") for text in ("[red]a", "b, c")]
    text = shown(jobs)
    assert "[red]a" in text
    assert '"b, c"' not in text.partition("folders in")[0]


def test_overrides_of_a_job_survive_its_process(tmp_path: Path) -> None:
    left = JobResult(tmp_path / "a", Status("ok"), overrides=("request.steps=4",))
    write_job(tmp_path / "jobs" / "000000.json", left)
    assert read_jobs(tmp_path / "jobs") == [left]
