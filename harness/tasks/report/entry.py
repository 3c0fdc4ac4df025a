"""task=report: one page over a tree of records."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rich.console import Console

from harness.config.yaml import to_dict
from harness.engines.pool import MakeEngine, new_engine
from harness.loggers.report import log_report
from harness.records.record import Status
from harness.resolve.compose import ConfigError, ResolvedRun
from harness.tasks.common.lifecycle import mirror
from harness.tasks.report.page import FILE, write_report


def check(run: ResolvedRun) -> None:
    """Refuse a report without runs.

    Raises:
        ConfigError: The folder of the runs is not given.
    """
    if run.config.report.runs is None:
        raise ConfigError("task=report needs a folder of runs; add report.runs=DIR, such as report.runs=sweeps")


def execute(run: ResolvedRun, console: Console, engines: MakeEngine = new_engine) -> Status:
    """Write the page, and log it to wandb if the user is logged in there.

    Args:
        run: The resolved run, whose folder is not used.
        console: Console for the summary line.
        engines: Not used; a report has no ranks.

    Returns:
        The status, which is not on disk: a report has no run folder.

    Raises:
        ConfigError: The page cannot be made or written.
    """
    config = run.config
    status = write_report(config, console)
    page = Path(config.report.out or Path(config.report.runs or "") / FILE)
    mirror(partial(log_report, config.logger.wandb, page, to_dict(config)))
    return status
