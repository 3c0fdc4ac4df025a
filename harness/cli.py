"""The command: `python -m harness` and `triptych`, one Hydra application.

A single run is composed in this process, which also starts its ranks. A sweep (-m) is Hydra's own loop over the same
function; a job that fails is a row of the table and does not end the sweep. Under the user's own torchrun, every rank
enters here and rank 0 owns the run.
"""

from __future__ import annotations

import atexit
import math
import secrets
import shutil
import signal
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import FrameType

from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from harness.config.schema import LoggerConfig, ProgressMode, RunConfig, Task, WandbConfig
from harness.config.tasks import TRAITS
from harness.engines.launcher import is_under_torchrun
from harness.engines.pool import EnginePool, MakeEngine, new_engine
from harness.loggers.level import log_to_terminal
from harness.loggers.run_names import job_title, shorten, wandb_group
from harness.loggers.search import print_search
from harness.loggers.table import print_sweep
from harness.loggers.wandb import check_connection, log_failure
from harness.plugins import load_plugins, loaded
from harness.records.job import JobResult, read_jobs, write_job, write_sweep_job
from harness.records.record import OF_USER, RunFolderError, Status, is_done, read_status
from harness.records.search import Measured, Search
from harness.records.side_by_side import RUNNING, note_beside, running_job
from harness.resolve.command import Command, parse_command, parse_flags
from harness.resolve.compose import (
    ConfigError,
    ResolvedRun,
    check_composed,
    compose_run,
    compose_sweep,
    from_yaml,
    load_plugins_of,
    register_schema,
    to_dict,
)
from harness.resolve.names import check_names, one_line
from harness.resolve.own_files import FAILURES, NOT_COMPOSED, explain
from harness.resolve.search_path import SearchPath
from harness.search.multirun import TARGET, search
from harness.search.objectives import measure
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
        command = parse_command(arguments)
        load_plugins_of(command.overrides, command.search)
        if command.flags.multirun:
            check_multirun(command)
            return sweep(command)
        if command.prints is not None:
            return print_with_hydra(command)
        return exit_status(run_one(compose_run(command.overrides, command.search), new_engine).status)
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
    try:
        flags = parse_flags(arguments)
        search = SearchPath.of_user([flags.config_dir] if flags.config_dir else (), flags.config_name)
        load_plugins_of(flags.overrides, search)
        names, roots = [name for name in flags.overrides if not name.startswith("plugins=")], search.roots()
        print("\n\n".join(describe(name, roots) for name in names) or help_text(roots))
    except ConfigError as error:
        print_error(error)
        return EXIT_BAD_INPUT
    return 0


def check_multirun(command: Command) -> None:
    """Refuse what cannot be swept with -m.

    Args:
        command: The command line.

    Raises:
        ConfigError: A flag that prints something, or a task that cannot be swept, is combined with -m.
    """
    if command.prints is not None:
        raise ConfigError(f"-m runs jobs and --{command.prints.replace('_', '-')} prints something; leave out one")
    for task in named_tasks(command.overrides):
        if (reason := TRAITS[task].not_swept) is not None:
            raise ConfigError(f"task={task.name} {reason}; run it without -m")


def named_tasks(arguments: Sequence[str]) -> list[Task]:
    """Return the tasks that a command line names, known even if the rest of it cannot be composed."""
    return [task for task in Task if f"task={task.name}" in arguments]


def run_one(run: ResolvedRun, engines: MakeEngine) -> JobResult:
    """Execute one task, by default in the folder that Hydra chose.

    Args:
        run: The resolved run.
        engines: Function that returns the run's engine, new or still warm from an earlier job.

    Returns:
        The folder and the status of the run.

    Raises:
        RunFolderError: Another run is in the folder.
        ConfigError: The task refuses the run, or the wandb server does.
    """
    task = run.config.task.name
    entry, own_folder = task_entry(task), TRAITS[task].folder
    entry.check(run)
    if TRAITS[task].mirrored:
        check_connection(run.config.logger.wandb)
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
        search: Search path of the configurations.
        outcomes: The folder of the outcomes of jobs in other processes; None if there are no such jobs.
        is_copy: Whether this session is that of a job's own process.
        plugins: The plug-ins of the jobs.
    """

    def __init__(
        self,
        search: SearchPath,
        outcomes: Path | None = None,
        is_copy: bool = False,
        plugins: Sequence[str] = (),
    ) -> None:
        self.jobs: list[JobResult] = []
        self.pool = EnginePool()
        self.search = search
        self.progress: SweepProgress | None = None
        self._outcomes = outcomes
        self._is_copy = is_copy
        atexit.register(self.pool.close)
        load_plugins(plugins)
        register_schema()

    def __reduce__(
        self,
    ) -> tuple[type[HydraSession], tuple[SearchPath, Path | None, bool, list[str]], dict[str, object]]:
        return HydraSession, (self.search, self._outcomes, True, [*loaded()]), {"progress": self.progress}

    def run(self, composed: DictConfig) -> float | Measured:
        """Run a job, as Hydra's task function.

        Args:
            composed: The configuration that Hydra composed.

        Returns:
            What the sweeper gets: the objectives of a search, or the value that a plug-in of Hydra's minimises.

        Raises:
            KeyboardInterrupt: The job was interrupted, which ends the sweep.
        """
        try:
            done = run_job(composed, self.pool.engine, self.search, self.varying())
        finally:
            if self._is_copy:  # a process of the launcher may run more jobs, and has no end of its own
                self.pool.close()
        hydra_config = HydraConfig.get()
        done = replace(done, overrides=tuple(hydra_config.overrides.task))
        with suppress(RunFolderError):  # a disk that is full has failed the job already
            write_sweep_job(done, Path(hydra_config.runtime.output_dir).parent, hydra_config.job.num)
        self.add(done, hydra_config.job.num)
        self.report(composed)
        if done.status.state == "cancelled":
            raise KeyboardInterrupt
        objectives = OmegaConf.select(hydra_config.sweeper, "objectives")
        return objective_value(done) if objectives is None else measure(done, objectives)

    def varying(self) -> set[str]:
        """Return the keys that vary in the sweep: those of the command line, and those of a sweeper's own."""
        params = HydraConfig.get().sweeper.get("params") or {}
        return {*params, *(() if self.progress is None else self.progress.keys)}

    def add(self, job: JobResult, number: int) -> None:
        """Add a finished job.

        Args:
            job: The job.
            number: The number of the job in the sweep.
        """
        self.jobs.append(job)
        if self._is_copy and self._outcomes is not None:
            write_job(self._outcomes / f"{number:06d}.json", job)

    def report(self, composed: DictConfig) -> None:
        """Print a line about the job that has ended, unless its progress was shown as bars."""
        mode = OmegaConf.select(composed, "logger.progress", default=ProgressMode.auto)
        if self.progress is not None and shows_lines(Console(), mode):
            print_line(self.progress.line(self.jobs[-1], HydraConfig.get().job.num, len(self.jobs)))


def complete(hydra: Hydra, command: Command) -> int:
    """Print a shell's completion, or the script that installs it.

    Args:
        hydra: Hydra on the command's configurations.
        command: The command line.

    Returns:
        The exit status.

    Raises:
        ConfigError: The shell is not one of Hydra's.
    """
    try:
        hydra.shell_completion(command.search.primary, command.overrides)
    except ValueError as error:
        raise ConfigError(f"--shell-completion: {one_line(error)}") from error
    return 0


def print_with_hydra(command: Command) -> int:
    """Print what a flag of Hydra's asks for: a configuration, its own help, or what a shell completes.

    Args:
        command: The command line.

    Returns:
        The exit status.

    Raises:
        ConfigError: Hydra cannot compose what was given.
    """
    flags, overrides, primary = command.flags, command.overrides, command.search.primary
    register_schema()
    try:
        with command.search.hydra() as hydra:
            if command.prints == "shell_completion":
                return complete(hydra, command)
            if command.prints == "hydra_help":
                hydra.hydra_help(primary, get_args_parser(), flags)
                return 0
            check_names(overrides, search=command.search)
            if command.prints == "info":
                hydra.show_info(flags.info, primary, overrides)
            else:
                hydra.show_cfg(primary, overrides, flags.cfg, flags.package, flags.resolve)
    except FAILURES as error:
        raise ConfigError(explain(error, command.search.roots())) from error
    return 0


def sweep(command: Command) -> int:
    """Run Hydra's -m, whose launcher runs the jobs in this process or in its own processes.

    Args:
        command: The command line.

    Returns:
        The exit status.

    Raises:
        ConfigError: Hydra cannot compose what was given; no folder is left.
    """
    folder, sweeper = compose_sweep(command.overrides, command.search)
    pinned = [o for o in command.overrides if not o.startswith("hydra.sweep.dir=")]
    pinned += [f"hydra.sweep.dir={QuotedString(str(folder), Quote.double).with_quotes()}", "hydra.mode=MULTIRUN"]
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    outcomes = folder.resolve() / f".jobs-{secrets.token_hex(4)}"
    session = HydraSession(command.search, outcomes)
    session.progress = SweepProgress.of(command.overrides)
    try:
        with session.pool, command.search.hydra() as hydra:
            run = partial(search, hydra) if sweeper == TARGET else hydra.multirun
            found = run(command.search.primary, session.run, pinned)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except NOT_COMPOSED as error:
        if folder in missing and [*folder.iterdir()] == [folder / "multirun.yaml"]:
            (folder / "multirun.yaml").unlink()
            remove_empty(missing)
        raise ConfigError(explain(error, command.search.roots(command.overrides))) from error
    jobs = session.jobs or read_jobs(outcomes)  # the launcher may run them in other processes
    for left in (outcomes, folder / RUNNING):
        shutil.rmtree(left, ignore_errors=True)
    if len(jobs) > 1:
        print_sweep(jobs, output_console())
        print_savings(sum(job.already_done for job in jobs), session.pool, output_console())
    if isinstance(found, Search):
        print_search(found, folder, output_console())
        return 0 if found.front else 1
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


def run_job(
    composed: DictConfig, make_engine: MakeEngine, search: SearchPath, varying: Collection[str] = ()
) -> JobResult:
    """Run one job of a sweep; any failure becomes the job's status, so that the next job runs.

    Args:
        composed: The configuration that Hydra composed, not yet checked.
        make_engine: Function that returns the job's engine, new or still warm from an earlier job.
        search: Search path of the configurations.
        varying: The keys that vary in the sweep; they name the job in wandb.

    Returns:
        The folder and the status of the job.
    """
    given = HydraConfig.get().overrides
    overrides = [*(override for override in given.hydra if override.startswith("hydra.searchpath=")), *given.task]
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        config, notes = check_composed(composed)
        if is_already_done(folder, config):
            return JobResult(folder, read_status(folder), already_done=True)
        config.logger.table = False  # one table over all jobs is printed at the end
        name_in_wandb(config.logger.wandb, folder, varying)
        with running_job(folder.parent, folder.name) as jobs_beside:
            job = run_one(ResolvedRun(config, overrides, folder, notes, retry=True, search=search), make_engine)
            note_beside(job, jobs_beside())
        return job
    except ConfigError as error:
        job = refuse(folder, error)
    except RunFolderError as error:
        print_error(error)
        job = JobResult(folder, Status("failed", str(error)), owns_folder=False)
    mirror_refusal(composed, job, varying)
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
    apart = dict.fromkeys((*OF_USER, "logger"))
    return planned | apart == wanted | apart


def mirror_refusal(composed: DictConfig, job: JobResult, varying: Collection[str]) -> None:
    """Log a refused job of a sweep to wandb, in the sweep's group.

    Args:
        composed: The configuration that Hydra composed; it is logged as declared, valid or not.
        job: The job. If another run is in its folder, its wandb run is in the sweep's.
        varying: The keys that vary in the sweep.
    """
    logger = OmegaConf.to_object(composed.logger)
    if not isinstance(logger, LoggerConfig):
        return
    sweep, task = job.folder.parent, composed.task.name.name
    name_in_wandb(logger.wandb, job.folder, varying)
    declared = OmegaConf.to_container(OmegaConf.masked_copy(composed, ["model", "scheduler", "parallel", "request"]))
    remarks = OmegaConf.to_container(OmegaConf.masked_copy(composed, ["tags", "notes", "meta"]))
    home = job.folder if job.owns_folder else sweep
    known = {"declared": declared, **(remarks if isinstance(remarks, dict) else {})}
    mirror(lambda: log_failure(logger.wandb, known, home, task, job.status, job.owns_folder))


def name_in_wandb(config: WandbConfig, folder: Path, varying: Collection[str]) -> None:
    """Fill in the name and the group that a job of a sweep has in wandb.

    Args:
        config: The job's `logger.wandb` group.
        folder: The job's folder.
        varying: The keys that vary in the sweep.
    """
    config.group = wandb_group(config.group, folder.parent)
    config.name = job_title(config.name, HydraConfig.get().overrides.task, varying) or shorten(folder.name)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived.

    Once a plain KeyboardInterrupt has passed through exec(), CPython ends the process with SIGINT, whatever exit status
    was set (run_eval_code_obj in pythonrun.c). A subclass avoids that. It happens, for instance, while a library is
    imported that builds its classes with exec().
    """


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(signal.Signals(number).name)
