"""The command: `python -m harness` and `triptych`, one Hydra application.

A single run is composed here and its ranks are started from here. A sweep (-m) is Hydra's own loop over the same
function, a failing job being a row and not the end. Under a torchrun of the user's own, every rank comes through here
and rank 0 owns the run.
"""

from __future__ import annotations

import atexit
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from harness.config.schema import LoggerConfig, RunConfig, Task
from harness.engines.pool import EnginePool, MakeEngine, new_engine
from harness.loggers.table import print_sweep
from harness.loggers.wandb import log_failure
from harness.records.record import RunFolder, RunFolderError, Status, is_done, read_record, read_status
from harness.resolve.comparison import quoted
from harness.resolve.compose import (
    ConfigError,
    ResolvedRun,
    checked,
    compose_run,
    register_schema,
    run_folder,
    sweep_folder,
    to_dict,
)
from harness.resolve.names import check_names
from harness.tasks.compare import compare_in, is_compared, sides
from harness.tasks.generate import run_in, run_training
from harness.tasks.lifecycle import ended, mirror, refuse
from harness.tasks.report.page import write_report
from harness.tasks.terminal import EXIT_BAD_INPUT, EXIT_INTERRUPTED, complain, exit_status

REPORT = "task=report"
SERVE = "task=serve"


def main() -> None:
    """Runs the command line; the exit status is 0 only where everything asked for was done."""
    arguments = sys.argv[1:]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from harness.tasks.under_torchrun import run_under_torchrun

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
            arguments = flags_first([quoted(argument) for argument in arguments])
            flags = get_args_parser().parse_args(list(arguments))
            check_names(flags.overrides, sweep=flags.multirun)
            if flags.multirun and flags.cfg:
                raise ConfigError("-m runs jobs and --cfg prints one configuration; leave out one of them")
            if flags.multirun and REPORT in arguments:
                raise ConfigError("task=report makes one page over all runs; run it without -m")
            if flags.multirun and SERVE in arguments:
                raise ConfigError("task=serve serves until it is told to stop; run it without -m")
            if flags.multirun:
                return sweep(arguments, flags.overrides)
            return 1 if any(job.status.state != "ok" for job in by_hydra(arguments).jobs) else 0
        return exit_status(run_one(compose_run(arguments), new_engine).status)
    except ConfigError as error:
        if REPORT in arguments:  # has no folder of its own
            complain(error)
        else:
            refuse(run_folder(arguments), error)
        return EXIT_BAD_INPUT
    except RunFolderError as error:
        complain(error)
        return EXIT_BAD_INPUT


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The same with -m in front, where Hydra's parser takes it among any overrides."""
    sweeps = [argument for argument in arguments if argument in ("-m", "--multirun")]
    return [*sweeps[:1], *(argument for argument in arguments if argument not in sweeps)]


@dataclass(frozen=True)
class Job:
    """One run and how it ended; `kept` where an earlier command had done it."""

    folder: Path
    status: Status
    kept: bool = False


def run_one(composed: ResolvedRun, make_engine: MakeEngine, again: bool = False) -> Job:
    """One task in the folder that Hydra names.

    Args:
        composed: the run.
        make_engine: makes its engine, or finds one that is warm.
        again: also in the folder of a run that did not end well.

    Raises:
        RunFolderError: another run is in it.
        ConfigError: a side of a comparison that cannot run, or a report over nothing.
    """
    if composed.config.task.name is Task.train:
        return Job(Path(composed.config.train.folder), run_training(composed.config, Console()))
    if composed.config.task.name is Task.report:
        return Job(composed.folder, write_report(composed.config, Console()))
    if composed.config.a is not None:
        pair = sides(composed)  # refused before a folder is claimed
        folder = RunFolder.claim(composed.folder, again)
        if composed.config.task.name is Task.load:
            from harness.tasks.load.compare import execute_load_comparison

            return Job(folder.path, execute_load_comparison(composed, pair, folder, Console()))
        return Job(folder.path, compare_in(composed, pair, folder, Console()))
    if composed.config.task.name is Task.serve:
        return serve(composed, again)
    folder = RunFolder.claim(composed.folder, again)
    if composed.config.task.name is Task.plan:
        from harness.tasks.plan.run import plan_in

        return Job(folder.path, plan_in(composed, folder, Console()))
    if composed.config.task.name is Task.load:
        from harness.tasks.load.run import execute_load

        return Job(folder.path, execute_load(composed, folder, Console(), make_engine))
    return Job(folder.path, run_in(composed, folder, Console(), make_engine))


def serve(composed: ResolvedRun, again: bool) -> Job:
    """The server, until it is told to stop; its address is had before a folder is claimed."""
    from harness.tasks.serve.serve import check, execute_serve, listen

    check(composed.config)
    with listen(composed.config.serve) as listening:
        folder = RunFolder.claim(composed.folder, again)
        status, _ = ended(composed, folder, lambda: execute_serve(composed, folder, listening), lambda status: status)
    return Job(folder.path, status)


class Ran:
    """The jobs that Hydra ran in this process, in which it knows our types and resolvers from now on, and the engines
    that they share.

    A launcher such as submitit's pickles it with the rest of a job; the process of that job makes one of its own.
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.pool = EnginePool()
        atexit.register(self.pool.close)
        register_schema()

    def __reduce__(self) -> tuple[type[Ran], tuple[()]]:
        return Ran, ()


def by_hydra(arguments: Sequence[str]) -> Ran:
    """The jobs that Hydra ran in this process for a command line of its own."""
    ran = Ran()

    @hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
    def job(composed: DictConfig) -> float:
        ran.jobs.append(run_job(composed, ran.pool.engine))
        if ran.jobs[-1].status.state == "cancelled":
            raise KeyboardInterrupt
        return value(ran.jobs[-1])

    sys.argv = [sys.argv[0], *arguments]
    with ran.pool:
        job()
    return ran


def sweep(arguments: Sequence[str], overrides: Sequence[str]) -> int:
    """Hydra's -m, whose launcher runs the jobs here or in processes of its own; the exit status.

    Args:
        arguments: the command line.
        overrides: those of the arguments that are no flags.
    """
    folder, at = sweep_folder(overrides), arguments.index(overrides[0]) if overrides else len(arguments)
    pinned = [] if any(o.startswith("hydra.sweep.dir=") for o in overrides) else [f"hydra.sweep.dir={folder}"]
    try:
        ran = by_hydra([*arguments[:at], *pinned, *arguments[at:]])
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    jobs = ran.jobs
    if not jobs:  # they ran in other processes
        jobs = [Job(file.parent, read_status(file.parent)) for file in sorted(folder.rglob("status.json"))]
    if len(jobs) > 1:
        print_sweep([job.folder for job in jobs], Console())
        print_savings(sum(job.kept for job in jobs), ran.pool, Console())
    return 1 if any(job.status.state != "ok" for job in jobs) else 0


def print_savings(kept: int, pool: EnginePool, console: Console) -> None:
    """What a sweep did not do twice."""
    if kept:
        console.print(f"{kept} jobs had been done before, with the same configuration, and were kept")
    if pool.reuses:
        console.print(
            f"ranks were started {pool.starts} times and reused {pool.reuses} times, "
            f"which saved {pool.saved_ms / 1e3:.1f} s of starting"
        )


def value(job: Job) -> float:
    """What a sweeper of Hydra's minimises: the median latency, ms; infinite where the run failed or answered nothing,
    or where its error at the pixel is above task.bound.
    """
    record = read_record(job.folder) if job.status.state == "ok" else None
    if record is None:
        return math.inf
    bound = record.config["task"]["bound"]
    if bound is not None and (record.fidelity is None or not record.fidelity.pixel.rel_l2 <= bound):
        return math.inf
    if record.summary is not None:
        return record.summary.latency_ms.median
    return math.inf if record.load is None or record.load.latency_ms is None else record.load.latency_ms.p50


def run_job(composed: DictConfig, make_engine: MakeEngine) -> Job:
    """One job of a sweep: whatever goes wrong becomes its status, so that the next job runs."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    sweeps = hydra_config.mode is RunMode.MULTIRUN
    try:
        config, notes = checked(composed)
        if sweeps and had(folder, config):
            return Job(folder, read_status(folder), kept=True)
        if sweeps:
            config.logger.table = False  # one table of all jobs, at the end
            config.logger.wandb.group = config.logger.wandb.group or sweep_group(folder.parent)
        return run_one(ResolvedRun(config, list(hydra_config.overrides.task), folder, notes), make_engine, again=sweeps)
    except ConfigError as error:
        status = refuse(folder, error, again=sweeps)
        mirror_refusal(composed, folder, status)
        return Job(folder, status)
    except RunFolderError as error:
        complain(error)
        return Job(folder, Status("failed", str(error)))


def had(folder: Path, config: RunConfig) -> bool:
    """Whether an earlier command has left the row of this very configuration."""
    return is_compared(folder, config) if config.a is not None else is_done(folder, to_dict(config))


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
