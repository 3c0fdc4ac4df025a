"""The command: `python -m harness` and `triptych`, one Hydra application.

A single run is composed in this process, which also starts its ranks. A sweep (-m) is Hydra's own loop over the same
function; a job that fails is a row of the table and does not end the sweep. Under the user's own torchrun, every rank
enters here and rank 0 owns the run.
"""

from __future__ import annotations

import atexit
import math
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from types import FrameType

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from harness.config.schema import LoggerConfig, ProgressMode, RunConfig, Task
from harness.config.tasks import TRAITS
from harness.engines.launcher import is_under_torchrun
from harness.engines.pool import EnginePool, MakeEngine, new_engine
from harness.loggers.level import log_to_terminal
from harness.loggers.table import print_sweep
from harness.loggers.wandb import log_failure
from harness.records.job import JobResult, read_jobs, write_job
from harness.records.record import RunFolderError, Status, is_done, read_status
from harness.resolve.comparison import quote_overrides
from harness.resolve.compose import (
    ConfigError,
    ResolvedRun,
    check_composed,
    compose_run,
    from_yaml,
    register_schema,
    sweep_folder,
    to_dict,
)
from harness.resolve.names import check_names, one_line
from harness.tasks import task_entry
from harness.tasks.common.comparison import is_compared
from harness.tasks.common.lifecycle import mirror, refuse, refuse_command
from harness.tasks.common.progress import SweepProgress, print_line, shows_lines
from harness.tasks.common.terminal import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    exit_status,
    outlive_readers,
    output_console,
    print_error,
)


def main() -> None:
    """Run the command line and exit with its status, which is 0 only if everything requested was done."""
    outlive_readers()
    arguments = sys.argv[1:]
    try:
        is_rank = not asks_for_help(arguments) and is_under_torchrun()
    except ConfigError as error:
        print_error(error)
        sys.exit(EXIT_BAD_INPUT)
    if is_rank:
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
    if asks_for_help(arguments):
        return print_help(arguments)
    try:
        if any(argument.startswith("-") for argument in arguments):
            arguments = multirun_flag_first([quote_overrides(argument) for argument in arguments])
            flags = get_args_parser().parse_args(list(arguments))
            check_names(flags.overrides, sweep=flags.multirun)
            if flags.multirun:
                check_multirun(arguments, bool(flags.cfg))
                return sweep(arguments, flags.overrides)
            return run_with_flags(arguments)
        return exit_status(run_one(compose_run(arguments), new_engine).status)
    except ConfigError as error:
        is_run = all(TRAITS[task].is_run for task in named_tasks(arguments))
        refuse_command(arguments if is_run else [], error)
        return EXIT_BAD_INPUT
    except RunFolderError as error:
        print_error(error)
        return EXIT_BAD_INPUT


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Return whether a command line asks for help or the version."""
    return bool({"-h", "--help", "--version"} & {*arguments})


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
    if task is not Task.serve:  # which has a log file
        log_to_terminal(run.config.logger)
    status = entry.execute(run, output_console(), engines)
    return JobResult(run.folder if own_folder is None else Path(attrgetter(own_folder)(run.config)), status)


class HydraSession:
    """The jobs that Hydra ran, and the engines that those in this process share.

    From the first session on, Hydra knows the schema's types and resolvers in this process. A launcher such as
    submitit's pickles the session with the rest of a job; the job's process then makes its own, and leaves the job's
    outcome in a folder.

    Args:
        outcomes: The folder of the outcomes of jobs in other processes; None if there are no such jobs.
        is_copy: Whether this session is that of a job's own process.
    """

    def __init__(self, outcomes: Path | None = None, is_copy: bool = False) -> None:
        self.jobs: list[JobResult] = []
        self.pool = EnginePool()
        self.progress: SweepProgress | None = None
        self._outcomes = outcomes
        self._is_copy = is_copy
        atexit.register(self.pool.close)
        register_schema()

    def __reduce__(self) -> tuple[type[HydraSession], tuple[Path | None, bool], dict[str, object]]:
        return HydraSession, (self._outcomes, True), {"progress": self.progress}

    def add(self, job: JobResult, number: int) -> None:
        """Add a finished job.

        Args:
            job: The job.
            number: The number of the job in the sweep.
        """
        job = replace(job, overrides=tuple(HydraConfig.get().overrides.task))
        self.jobs.append(job)
        if self._is_copy and self._outcomes is not None:
            write_job(self._outcomes / f"{number:06d}.json", job)

    def report(self, composed: DictConfig) -> None:
        """Print a line about the job that has ended, unless its progress was shown as bars."""
        mode = OmegaConf.select(composed, "logger.progress", default=ProgressMode.auto)
        if self.progress is not None and shows_lines(Console(), mode):
            print_line(self.progress.line(self.jobs[-1], HydraConfig.get().job.num, len(self.jobs)))


def run_with_hydra(arguments: Sequence[str], session: HydraSession) -> None:
    """Pass a command line with flags to Hydra.

    Args:
        arguments: The command line, flags included.
        session: The session that receives the jobs.

    Raises:
        ConfigError: Hydra cannot compose what was given.
    """

    @hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
    def job(composed: DictConfig) -> float:
        done = run_job(composed, session.pool.engine)
        session.add(done, HydraConfig.get().job.num if HydraConfig.get().mode is RunMode.MULTIRUN else 0)
        session.report(composed)
        if done.status.state == "cancelled":
            raise KeyboardInterrupt
        return objective_value(done)

    sys.argv = [sys.argv[0], *arguments]
    with session.pool, variables({"HYDRA_FULL_ERROR": "1"}):  # Hydra raises its errors and prints none
        try:
            job()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(one_line(error)) from error


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the context, and restore them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def run_with_flags(arguments: Sequence[str]) -> int:
    """Run one job with flags of Hydra's own.

    Args:
        arguments: The command line, flags included.

    Returns:
        The exit status.
    """
    session = HydraSession()
    run_with_hydra(arguments, session)
    return 1 if any(job.status.state != "ok" for job in session.jobs) else 0


def sweep(arguments: Sequence[str], overrides: Sequence[str]) -> int:
    """Run Hydra's -m, whose launcher runs the jobs in this process or in its own processes.

    Args:
        arguments: The command line, flags included.
        overrides: The arguments that are not flags.

    Returns:
        The exit status.

    Raises:
        ConfigError: Hydra cannot compose what was given; no folder is left.
    """
    folder, at = sweep_folder(overrides), arguments.index(overrides[0]) if overrides else len(arguments)
    pinned = [] if any(o.startswith("hydra.sweep.dir=") for o in overrides) else [f"hydra.sweep.dir={folder}"]
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    outcomes = folder.resolve() / f".jobs-{secrets.token_hex(4)}"
    session = HydraSession(outcomes)
    session.progress = SweepProgress.of(overrides)
    try:
        run_with_hydra([*arguments[:at], *pinned, *arguments[at:]], session)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except ConfigError:
        if folder in missing and [*folder.iterdir()] == [folder / "multirun.yaml"]:
            (folder / "multirun.yaml").unlink()
            remove_empty(missing)
        raise
    jobs = session.jobs or read_jobs(outcomes)  # the launcher may run them in other processes
    shutil.rmtree(outcomes, ignore_errors=True)
    if len(jobs) > 1:
        print_sweep(jobs, output_console())
        print_savings(sum(job.already_done for job in jobs), session.pool, output_console())
    return 1 if any(job.status.state != "ok" for job in jobs) else 0


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that are empty, in the order given: the innermost first."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


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
    record = job.record() if job.status.state == "ok" else None
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
        if not is_sweep:
            remove_empty([folder, *folder.parents[:2]])  # Hydra has made it
            refuse_command(hydra_config.overrides.hydra, error)
            return JobResult(folder, Status("failed", str(error)), owns_folder=False)
        job = refuse(folder, error)
    except RunFolderError as error:
        print_error(error)
        job = JobResult(folder, Status("failed", str(error)), owns_folder=False)
    if is_sweep:
        mirror_refusal(composed, job)
    return job


def is_already_done(folder: Path, config: RunConfig) -> bool:
    """Return whether an earlier command left the result of this same configuration in the folder."""
    if TRAITS[config.task.name].only_shapes:
        return is_planned(folder, config)
    return is_compared(folder, config) if config.compare.a is not None else is_done(folder, to_dict(config))


def is_planned(folder: Path, config: RunConfig) -> bool:
    """Return whether a folder holds the finished plan of this same configuration."""
    file = folder / "config.yaml"
    if read_status(folder).state != "ok" or not file.exists():
        return False
    planned, wanted = to_dict(from_yaml(file.read_text())), to_dict(config)
    return planned | {"logger": None} == wanted | {"logger": None}


def mirror_refusal(composed: DictConfig, job: JobResult) -> None:
    """Log a refused job of a sweep to wandb, in the sweep's group.

    Args:
        composed: The configuration that Hydra composed; it is logged as declared, valid or not.
        job: The job. If another run is in its folder, its wandb run is in the sweep's.
    """
    logger = OmegaConf.to_object(composed.logger)
    if not isinstance(logger, LoggerConfig):
        return
    sweep, task = job.folder.parent, composed.task.name.name
    logger.wandb.group = logger.wandb.group or sweep_group(sweep)
    declared = OmegaConf.to_container(OmegaConf.masked_copy(composed, ["model", "scheduler", "parallel", "request"]))
    home = job.folder if job.owns_folder else sweep
    mirror(lambda: log_failure(logger.wandb, {"declared": declared}, home, task, job.status, job.folder.name))


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
