"""The command: `python -m harness` and `triptych`, one Hydra application.

A single run is composed in this process, which also starts its ranks. A sweep (-m) is Hydra's own loop over the same
function; a job that fails is a row of the table and does not end the sweep. Under the user's own torchrun, every rank
enters here and rank 0 owns the run.
"""

from __future__ import annotations

import atexit
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import FrameType

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from harness.config.schema import LoggerConfig, RunConfig, Task
from harness.config.tasks import TRAITS
from harness.engines.pool import EnginePool, MakeEngine, new_engine
from harness.loggers.table import print_sweep
from harness.loggers.wandb import log_failure
from harness.records.record import RunFolderError, Status, is_done, read_record, read_status
from harness.resolve.comparison import quote_overrides
from harness.resolve.compose import (
    ConfigError,
    ResolvedRun,
    check_composed,
    compose_run,
    register_schema,
    run_folder,
    sweep_folder,
    to_dict,
)
from harness.resolve.names import check_names
from harness.tasks import task_entry
from harness.tasks.common.comparison import is_compared
from harness.tasks.common.lifecycle import mirror, refuse
from harness.tasks.common.terminal import EXIT_BAD_INPUT, EXIT_INTERRUPTED, exit_status, print_error


def main() -> None:
    """Run the command line and exit with its status, which is 0 only if everything requested was done."""
    arguments = sys.argv[1:]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from harness.tasks.common.under_torchrun import run_under_torchrun

        sys.exit(run_under_torchrun(arguments))
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(dispatch(arguments))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def dispatch(arguments: Sequence[str]) -> int:
    """Run one command line in this process.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The exit status.
    """
    if {"-h", "--help", "--version"} & {*arguments}:
        return print_help(arguments)
    try:
        if any(argument.startswith("-") for argument in arguments):
            arguments = multirun_flag_first([quote_overrides(argument) for argument in arguments])
            flags = get_args_parser().parse_args(list(arguments))
            check_names(flags.overrides, sweep=flags.multirun)
            if flags.multirun:
                check_multirun(arguments, bool(flags.cfg))
                return sweep(arguments, flags.overrides)
            return 1 if any(job.status.state != "ok" for job in run_with_hydra(arguments).jobs) else 0
        return exit_status(run_one(compose_run(arguments), new_engine).status)
    except ConfigError as error:
        if any(not TRAITS[task].is_run for task in named_tasks(arguments)):
            print_error(error)
        else:
            refuse(run_folder(arguments), error)
        return EXIT_BAD_INPUT
    except RunFolderError as error:
        print_error(error)
        return EXIT_BAD_INPUT


def print_help(arguments: Sequence[str]) -> int:
    """Print the version, what the names among the arguments mean, or the help.

    Args:
        arguments: The command line, with --version or --help.

    Returns:
        The exit status: that of bad input if a name is unknown.
    """
    from harness.resolve.reference import describe, help_text, version_text

    if "--version" in arguments:
        print(version_text())
        return 0
    names = [argument for argument in arguments if not argument.startswith("-")]
    try:
        print("\n\n".join(describe(name) for name in names) or help_text())
    except ConfigError as error:
        print_error(error)
        return EXIT_BAD_INPUT
    return 0


def check_multirun(arguments: Sequence[str], prints_config: bool) -> None:
    """Refuse what cannot be swept with -m.

    Args:
        arguments: The command line.
        prints_config: Whether --cfg is among the flags.

    Raises:
        ConfigError: --cfg or a task that cannot be swept is combined with -m.
    """
    if prints_config:
        raise ConfigError("-m runs jobs and --cfg prints one configuration; leave out one of them")
    for task in named_tasks(arguments):
        if (reason := TRAITS[task].not_swept) is not None:
            raise ConfigError(f"task={task.name} {reason}; run it without -m")


def named_tasks(arguments: Sequence[str]) -> list[Task]:
    """Return the tasks that a command line names, known even if the rest of it cannot be composed."""
    return [task for task in Task if f"task={task.name}" in arguments]


def multirun_flag_first(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with -m in front, where Hydra's parser accepts it whatever overrides follow."""
    multirun = [argument for argument in arguments if argument in ("-m", "--multirun")]
    return [*multirun[:1], *(argument for argument in arguments if argument not in multirun)]


@dataclass(frozen=True)
class JobResult:
    """The outcome of one job.

    Attributes:
        folder: The run's folder.
        status: How the run ended.
        already_done: Whether an earlier command had done this job, so that it was skipped.
    """

    folder: Path
    status: Status
    already_done: bool = False


def run_one(run: ResolvedRun, engines: MakeEngine) -> JobResult:
    """Execute one task, by default in the folder that Hydra chose.

    Args:
        run: The resolved run.
        engines: Function that returns the run's engine, new or still warm from an earlier job.

    Returns:
        The folder and the status of the run.

    Raises:
        RunFolderError: Another run is in the folder.
        ConfigError: The task refuses the run.
    """
    task = run.config.task.name
    entry, own_folder = task_entry(task), TRAITS[task].folder
    entry.check(run)
    status = entry.execute(run, Console(), engines)
    return JobResult(run.folder if own_folder is None else Path(attrgetter(own_folder)(run.config)), status)


class HydraSession:
    """The jobs that Hydra ran in this process, and the engines that they share.

    From the first session on, Hydra knows the schema's types and resolvers in this process. A launcher such as
    submitit's pickles the session with the rest of a job; the job's process then makes its own.
    """

    def __init__(self) -> None:
        self.jobs: list[JobResult] = []
        self.pool = EnginePool()
        atexit.register(self.pool.close)
        register_schema()

    def __reduce__(self) -> tuple[type[HydraSession], tuple[()]]:
        return HydraSession, ()


def run_with_hydra(arguments: Sequence[str]) -> HydraSession:
    """Pass a command line with flags to Hydra.

    Args:
        arguments: The command line, flags included.

    Returns:
        The session, with the jobs that ran in this process.
    """
    session = HydraSession()

    @hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
    def job(composed: DictConfig) -> float:
        session.jobs.append(run_job(composed, session.pool.engine))
        if session.jobs[-1].status.state == "cancelled":
            raise KeyboardInterrupt
        return objective_value(session.jobs[-1])

    sys.argv = [sys.argv[0], *arguments]
    with session.pool:
        job()
    return session


def sweep(arguments: Sequence[str], overrides: Sequence[str]) -> int:
    """Run Hydra's -m, whose launcher runs the jobs in this process or in its own processes.

    Args:
        arguments: The command line, flags included.
        overrides: The arguments that are not flags.

    Returns:
        The exit status.
    """
    folder, at = sweep_folder(overrides), arguments.index(overrides[0]) if overrides else len(arguments)
    pinned = [] if any(o.startswith("hydra.sweep.dir=") for o in overrides) else [f"hydra.sweep.dir={folder}"]
    try:
        session = run_with_hydra([*arguments[:at], *pinned, *arguments[at:]])
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    jobs = session.jobs
    if not jobs:  # the launcher ran them in other processes
        jobs = [JobResult(file.parent, read_status(file.parent)) for file in sorted(folder.rglob("status.json"))]
    if len(jobs) > 1:
        print_sweep([job.folder for job in jobs], Console())
        print_savings(sum(job.already_done for job in jobs), session.pool, Console())
    return 1 if any(job.status.state != "ok" for job in jobs) else 0


def print_savings(already_done: int, pool: EnginePool, console: Console) -> None:
    """Print how many jobs a sweep skipped, and how often it reused ranks."""
    if already_done:
        console.print(f"{already_done} jobs were already done with the same configuration and were skipped")
    if pool.reuses:
        console.print(
            f"ranks were started {pool.starts} times and reused {pool.reuses} times, "
            f"which saved {pool.saved_ms / 1e3:.1f} s of starting"
        )


def objective_value(job: JobResult) -> float:
    """Return the value that one of Hydra's sweepers minimises: the median latency in ms.

    Args:
        job: A finished job.

    Returns:
        The median latency in ms. Infinity if the run failed or answered nothing, or if its pixel error is above
        task.max_pixel_error.
    """
    record = read_record(job.folder) if job.status.state == "ok" else None
    if record is None:
        return math.inf
    bound = record.config["task"]["max_pixel_error"]
    if bound is not None and (record.fidelity is None or not record.fidelity.pixel.rel_l2 <= bound):
        return math.inf
    if record.summary is not None:
        return record.summary.latency_ms.median
    return math.inf if record.load is None or record.load.latency_ms is None else record.load.latency_ms.p50


def run_job(composed: DictConfig, make_engine: MakeEngine) -> JobResult:
    """Run one job of a sweep; any failure becomes the job's status, so that the next job runs.

    Args:
        composed: The configuration that Hydra composed, not yet checked.
        make_engine: Function that returns the job's engine, new or still warm from an earlier job.

    Returns:
        The folder and the status of the job.
    """
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    is_sweep = hydra_config.mode is RunMode.MULTIRUN
    try:
        config, notes = check_composed(composed)
        if is_sweep and is_already_done(folder, config):
            return JobResult(folder, read_status(folder), already_done=True)
        if is_sweep:
            config.logger.table = False  # one table over all jobs is printed at the end
            config.logger.wandb.group = config.logger.wandb.group or sweep_group(folder.parent)
        run = ResolvedRun(config, list(hydra_config.overrides.task), folder, notes, retry=is_sweep)
        return run_one(run, make_engine)
    except ConfigError as error:
        status = refuse(folder, error, retry=is_sweep)
        mirror_refusal(composed, folder, status)
        return JobResult(folder, status)
    except RunFolderError as error:
        print_error(error)
        return JobResult(folder, Status("failed", str(error)))


def is_already_done(folder: Path, config: RunConfig) -> bool:
    """Return whether an earlier command left the result of this same configuration in the folder."""
    return is_compared(folder, config) if config.compare.a is not None else is_done(folder, to_dict(config))


def mirror_refusal(composed: DictConfig, folder: Path, status: Status) -> None:
    """Log a refused job of a sweep to wandb, in the sweep's group.

    Args:
        composed: The configuration that Hydra composed; it is logged as declared, valid or not.
        folder: The job's folder.
        status: The status that names the error.
    """
    logger = OmegaConf.to_object(composed.logger)
    if not isinstance(logger, LoggerConfig):
        return
    logger.wandb.group = logger.wandb.group or sweep_group(folder.parent)
    declared = OmegaConf.to_container(OmegaConf.masked_copy(composed, ["model", "scheduler", "parallel", "request"]))
    mirror(lambda: log_failure(logger.wandb, {"declared": declared}, folder, composed.task.name.name, status))


def sweep_group(folder: Path) -> str:
    """Return the wandb group of a sweep: the last two parts of its folder, such as 2026-01-31-12-00-00."""
    return "-".join(folder.parts[-2:])


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived.

    Once a plain KeyboardInterrupt has passed through exec(), CPython ends the process with SIGINT, whatever exit status
    was set (run_eval_code_obj in pythonrun.c). A subclass avoids that. It happens, for instance, while a library is
    imported that builds its classes with exec().
    """


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(signal.Signals(number).name)
