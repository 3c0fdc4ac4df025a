"""The command: `python -m harness` and `triptych`, one Hydra application.

A single run is composed here and its ranks are started from here. A sweep (-m) is Hydra's own loop over the same
function, a failing job being a row and not the end. Under a torchrun of the user's own, every rank comes through here
and rank 0 owns the run.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from harness.client import DiffusionGenerator
from harness.compare import compare_in, sides
from harness.compose import (
    Composed,
    ConfigError,
    check_names,
    checked,
    compose_run,
    register_schema,
    run_folder,
)
from harness.config.schema import LoggerConfig, Task
from harness.config.sides import quoted
from harness.generate import mirror, refuse, run_in, run_training
from harness.loggers.table import print_sweep
from harness.loggers.wandb import log_failure
from harness.records import RunFolder, RunFolderError, Status
from harness.report.page import write_report
from harness.terminal import EXIT_BAD_INPUT, EXIT_INTERRUPTED, complain, exit_status

REPORT = "task=report"


def main() -> None:
    """Runs the command line; the exit status is 0 only where everything asked for was done."""
    arguments = sys.argv[1:]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from harness.attached import run_under_torchrun

        sys.exit(run_under_torchrun(arguments))
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(dispatch(arguments))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def dispatch(arguments: Sequence[str]) -> int:
    """Runs one command line in this process; the exit status."""
    try:
        if any(argument.startswith("-") for argument in arguments):
            arguments = [quoted(argument) for argument in arguments]
            flags = get_args_parser().parse_args(list(arguments))
            check_names(flags.overrides, sweep=flags.multirun)
            if flags.multirun and REPORT in arguments:
                raise ConfigError("task=report makes one page over all runs; run it without -m")
            return sweep_or_show(arguments)
        return exit_status(run_one(compose_run(arguments)).status)
    except ConfigError as error:
        if REPORT in arguments:  # has no folder of its own
            complain(error)
        else:
            refuse(run_folder(arguments), error)
        return EXIT_BAD_INPUT
    except RunFolderError as error:
        complain(error)
        return EXIT_BAD_INPUT


@dataclass(frozen=True)
class Job:
    """One run and how it ended."""

    folder: Path
    status: Status


def run_one(composed: Composed) -> Job:
    """One task in the folder that Hydra names.

    Raises:
        RunFolderError: another run is in it.
        ConfigError: a side of a comparison that cannot run, or a report over nothing.
    """
    if composed.config.task.name is Task.train:
        return Job(Path(composed.config.train.folder), run_training(composed.config, Console()))
    if composed.config.task.name is Task.report:
        return Job(composed.folder, write_report(composed.config, Console()))
    if composed.config.task.name is Task.compare:
        pair = sides(composed)  # refused before a folder is claimed
        folder = RunFolder.claim(composed.folder)
        return Job(folder.path, compare_in(composed, pair, folder, Console()))
    folder = RunFolder.claim(composed.folder)
    make = partial(DiffusionGenerator.from_composed, composed, folder.path)
    return Job(folder.path, run_in(composed, folder, Console(), make))


def sweep_or_show(arguments: Sequence[str]) -> int:
    """Hydra's own command line: -m sweeps, --cfg, --help and the like; the exit status."""
    register_schema()
    jobs: list[Job] = []

    @hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
    def job(composed: DictConfig) -> None:
        jobs.append(run_job(composed))
        if jobs[-1].status.state == "cancelled":
            raise KeyboardInterrupt

    sys.argv = [sys.argv[0], *arguments]
    try:
        job()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if len(jobs) > 1:
        print_sweep([job.folder for job in jobs], Console())
    return 1 if any(job.status.state != "ok" for job in jobs) else 0


def run_job(composed: DictConfig) -> Job:
    """One job of a sweep: whatever goes wrong becomes its status, so that the next job runs."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    try:
        config, notes = checked(composed)
        if hydra_config.mode is RunMode.MULTIRUN:
            config.logger.table = False  # one table of all jobs, at the end
            config.logger.wandb.group = config.logger.wandb.group or sweep_group(folder.parent)
        return run_one(Composed(config, list(hydra_config.overrides.task), folder, notes))
    except ConfigError as error:
        status = refuse(folder, error)
        mirror_refusal(composed, folder, status)
        return Job(folder, status)
    except RunFolderError as error:
        complain(error)
        return Job(folder, Status("failed", str(error)))


def mirror_refusal(composed: DictConfig, folder: Path, status: Status) -> None:
    """A refused job of a sweep is a run of its wandb group too, with what was declared, right or wrong."""
    logger = OmegaConf.to_object(composed.logger)
    if not isinstance(logger, LoggerConfig):
        return
    logger.wandb.group = logger.wandb.group or sweep_group(folder.parent)
    declared = OmegaConf.to_container(OmegaConf.masked_copy(composed, ["model", "scheduler", "parallel", "request"]))
    mirror(lambda: log_failure(logger.wandb, {"declared": declared}, folder, composed.task.name.name, status))


def sweep_group(folder: Path) -> str:
    """The wandb group of a sweep: its folder's last parts, such as 2026-01-31-12-00-00."""
    return "-".join(folder.parts[-2:])


class Terminated(KeyboardInterrupt):
    """SIGTERM. CPython ends with SIGINT, whatever exit status was asked for, once a KeyboardInterrupt proper has passed
    through exec() (run_eval_code_obj in pythonrun.c), as when a library that makes its classes so is being imported.
    """


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(signal.Signals(number).name)
