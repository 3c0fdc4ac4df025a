"""task=plan: predict every valid layout of a request, or compare predictions with records."""

from __future__ import annotations

from rich.console import Console

from harness.config.plan import check_plan
from harness.engines.pool import MakeEngine, new_engine
from harness.records.record import RunFolder, Status
from harness.resolve.compose import ConfigError, ResolvedRun
from harness.tasks.common.lifecycle import guarded


def check(run: ResolvedRun) -> None:
    """Refuse what cannot be predicted.

    Raises:
        ConfigError: A key of `plan` or `hardware` has a wrong value.
    """
    try:
        check_plan(run.config.plan, run.config.hardware)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def execute(run: ResolvedRun, console: Console, engines: MakeEngine = new_engine) -> Status:
    """Plan; any failure becomes the status.

    Args:
        run: The resolved run.
        console: Console for the table.
        engines: Not used; a plan has no ranks.

    Returns:
        The status, which is on disk.

    Raises:
        RunFolderError: Another run is in the folder.
    """
    from harness.tasks.plan.run import run_plan
    from harness.tasks.plan.table import print_checks, print_plan

    config, plan = run.config, None
    folder = RunFolder.claim(run.folder, run.retry)
    with guarded(run, folder) as outcome:
        plan = run_plan(config, folder)
    if plan is not None and config.logger.table:
        if config.plan.runs is None:
            print_plan(plan, config.plan.rows, folder.path, console)
        else:
            print_checks(plan, folder.path, console)
    return outcome.status
