"""task=train: train a small model of one family, in its own folder; any failure becomes the status."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from harness.config.schema import RunConfig
from harness.engines.pool import MakeEngine, new_engine
from harness.loggers.level import set_log_level
from harness.loggers.training import LogCallback, ProgressCallback, TrainingCallbacks, WandbCallback
from harness.records.record import INTERRUPTED, RunFolder, Status
from harness.resolve.compose import ResolvedRun, to_dict, to_yaml
from harness.resolve.scheduler import noise_scheduler_settings
from harness.tasks.common.lifecycle import mirror, status_from_error
from harness.tasks.common.progress import shows_bars, shows_lines
from harness.tasks.common.terminal import print_error


def check(run: ResolvedRun) -> None:
    """Accept the run: a training checks its own keys part by part."""


def execute(run: ResolvedRun, console: Console, engines: MakeEngine = new_engine) -> Status:
    """Train the family of config group `scheduler`; a training found in the folder is resumed.

    Args:
        run: The resolved run, whose folder is not used: a training works in train.folder.
        console: Console for the progress bars; without a terminal, or with logger.progress=lines, there are log lines.
        engines: Not used; a training has no ranks.

    Returns:
        The status, which is on disk.
    """
    config = run.config
    Path(config.train.folder).mkdir(parents=True, exist_ok=True)
    folder = RunFolder(Path(config.train.folder))
    folder.write_config(to_yaml(config))
    folder.finish(INTERRUPTED)
    curve = WandbCallback(config.logger.wandb, to_dict(config), folder.path, config.scheduler.family, mirror)
    try:
        _train(config, console, curve)
        status = Status("ok")
    except (Exception, KeyboardInterrupt) as error:
        status = status_from_error(error)
        if isinstance(error, ModuleNotFoundError):
            status = Status("failed", f"training needs the package {error.name}: pip install 'triptych[train]'")
        print_error(f"{status.state}: {status.error} (what was trained so far is in {folder.path})")
    folder.finish(status)
    curve.finish(status)
    return status


def _train(config: RunConfig, console: Console, curve: WandbCallback) -> None:
    from harness.tasks.train.run import run

    settings, mode = noise_scheduler_settings(config.scheduler, config.plugin), config.logger.progress
    if shows_bars(console, mode):
        logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=console)])
        set_log_level(config.logger)
        with ProgressCallback(console) as bars:
            run(config.train, settings, TrainingCallbacks([bars, curve]))
    else:
        logging.basicConfig(format="%(asctime)s %(message)s")
        set_log_level(config.logger)
        lines = [LogCallback()] if shows_lines(console, mode) else []
        run(config.train, settings, TrainingCallbacks([*lines, curve]))
