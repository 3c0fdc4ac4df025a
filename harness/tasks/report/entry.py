"""task=report: one page over a tree of records."""

from __future__ import annotations

from rich.console import Console

from harness.engines.pool import MakeEngine, new_engine
from harness.records.record import Status
from harness.resolve.compose import ConfigError, ResolvedRun
from harness.tasks.report.page import write_report


def check(run: ResolvedRun) -> None:
    """Refuse a report without runs.

    Raises:
        ConfigError: The folder of the runs is not given.
    """
    if run.config.report.runs is None:
        raise ConfigError("task=report needs a folder of runs; add report.runs=DIR, such as report.runs=sweeps")


def execute(run: ResolvedRun, console: Console, engines: MakeEngine = new_engine) -> Status:
    """Write the page.

    Args:
        run: The resolved run, whose folder is not used.
        console: Console for the summary line.
        engines: Not used; a report has no ranks.

    Returns:
        The status, which is not on disk: a report has no run folder.

    Raises:
        ConfigError: The page cannot be made or written.
    """
    return write_report(run.config, console)
