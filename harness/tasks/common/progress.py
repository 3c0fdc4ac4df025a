"""What is seen while a run works: bars on a terminal, elsewhere a line every half minute.

Lines go to standard error, so that standard output has the results alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn

from harness.config.schema import ProgressMode
from harness.records.job import JobResult

INTERVAL_S = 30.0


def shows_bars(console: Console, mode: ProgressMode) -> bool:
    """Return whether progress is shown as bars: on a terminal, unless logger.progress says otherwise."""
    return console.is_terminal and mode is ProgressMode.auto


def shows_lines(console: Console, mode: ProgressMode) -> bool:
    """Return whether progress is shown as lines: without a terminal, or where logger.progress=lines."""
    return not console.quiet and mode is not ProgressMode.none and not shows_bars(console, mode)


@contextmanager
def progress_bars(console: Console, mode: ProgressMode = ProgressMode.auto) -> Iterator[Progress]:
    """Show the progress of a run while the block runs.

    Args:
        console: Console of the run.
        mode: Value of logger.progress.

    Yields:
        The progress to update; it is the same object for bars, lines and neither.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not shows_bars(console, mode)) as bars:
        if not shows_lines(console, mode):
            yield bars
            return
        ended = threading.Event()
        thread = threading.Thread(target=_print_lines, args=(bars, ended), name="progress", daemon=True)
        thread.start()
        try:
            yield bars
        finally:
            ended.set()
            thread.join()


def _print_lines(bars: Progress, ended: threading.Event) -> None:
    while not ended.wait(INTERVAL_S):
        for task in bars.tasks:
            print_line(describe_task(task))


def describe_task(task: Task) -> str:
    """Return what is done of a task and what is left, such as `generating 2 of 5: denoising, 7 done, 13 left; 41 s`."""
    counts = "" if task.total is None else f", {task.completed:g} done, {task.total - task.completed:g} left"
    return f"{task.description}{counts}; {task.elapsed or 0:.0f} s"


def print_line(text: str) -> None:
    """Print one line of progress on standard error."""
    Console(stderr=True).print(f"triptych: {escape(text)}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class SweepProgress:
    """How far a sweep is, for the line that each job prints at its end.

    Attributes:
        keys: The keys that are swept.
        total: Number of jobs; None if a sweeper chooses them as it goes.
        began: Time at which the sweep began, s since 1970.
    """

    keys: tuple[str, ...]
    total: int | None
    began: float = field(default_factory=time.time)

    @classmethod
    def of(cls, overrides: Sequence[str]) -> SweepProgress:
        """Return the progress of a sweep that begins now.

        Args:
            overrides: Overrides of the command line, of which some have several values.
        """
        parsed = {each.key_or_group: each for each in map(OverridesParser.create().parse_override, overrides)}
        swept = {key: each for key, each in parsed.items() if each.is_sweep_override()}
        try:
            total = prod(sum(1 for _ in each.sweep_string_iterator()) for each in swept.values())
        except HydraException:  # a glob, or an interval
            return cls(tuple(swept), None)
        return cls(tuple(swept), None if "hydra/sweeper" in parsed else total)

    def line(self, job: JobResult, number: int, done: int) -> str:
        """Return the line of a job that has ended, such as `job 3 of 12: ok, request.steps=4; 9 left, about 37 s`.

        Args:
            job: The job.
            number: Number of the job, from 0.
            done: Number of jobs that have ended in this process.
        """
        of = "" if self.total is None else f" of {self.total}"
        own = ", ".join(each for each in job.overrides if each.partition("=")[0].lstrip("+") in self.keys)
        ended = f"job {number + 1}{of}: {'done before' if job.already_done else job.status.state}"
        left = 0 if self.total is None else self.total - number - 1
        spent = time.time() - self.began
        rest = f"; {left} left, about {spent / done * left:.0f} s" if left and done == number + 1 else ""
        return f"{ended}{', ' if own else ''}{own}{rest}"
