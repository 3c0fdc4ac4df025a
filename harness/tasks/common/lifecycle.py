"""The life cycle of a task in its run folder: a status is always written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from harness.engines.protocol import RequestFailed
from harness.loggers.wandb import log_failure
from harness.records.job import JobResult
from harness.records.record import STATES, RunFolder, RunFolderError, Status, cannot_be_written, is_full
from harness.resolve.compose import ResolvedRun, named_folder, to_dict
from harness.serving.faults import failure_kind, failure_line
from harness.serving.transport import EngineGone
from harness.tasks.common.terminal import print_error


def claim(run: ResolvedRun) -> RunFolder:
    """Claim the folder of a run; one that generates a data set goes on with what an earlier command left there.

    Args:
        run: The resolved run.

    Returns:
        The claimed folder.

    Raises:
        RunFolderError: Another run is in the folder.
    """
    return RunFolder.claim(run.folder, run.retry, None if run.dataset is None else to_dict(run.config))


@dataclass
class Outcome:
    """How the work in a folder ended.

    Attributes:
        status: Status of the run; the work sets it, and a failure replaces it.
    """

    status: Status = field(default_factory=lambda: Status("ok"))


@contextmanager
def guarded(run: ResolvedRun, folder: RunFolder) -> Iterator[Outcome]:
    """Guard the work of a claimed folder: any failure becomes a status, a line on the terminal, and an entry in wandb.

    The status is on disk when the block is left. A successful result is not logged to wandb here; the caller does that.

    Args:
        run: The resolved run.
        folder: The claimed folder.

    Yields:
        The outcome.
    """
    config, outcome = run.config, Outcome()
    try:
        yield outcome
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, OSError) and is_full(error):
            error = RunFolderError(cannot_be_written(folder.path, error))
        status = outcome.status = status_from_error(error)
        finish(folder, status)
        print_error(f"{status.state}: {status.error} (see {folder.path})")
        if status.state != "cancelled":
            task = config.task.name.name
            mirror(lambda: log_failure(config.logger.wandb, to_dict(config), folder.path, task, status))
        return
    outcome.status = finish(folder, outcome.status)
    if outcome.status.error is not None:
        print_error(f"{outcome.status.error} (see {folder.path})")


def finish(folder: RunFolder, status: Status) -> Status:
    """Write a run's status.

    Args:
        folder: The run's folder.
        status: How the run ended.

    Returns:
        The status. A run whose status the disk does not take has failed; the one on disk still says so.
    """
    try:
        folder.finish(status)
    except RunFolderError as error:
        return Status("failed", str(error)) if status.state == "ok" else status
    return status


def refuse_command(overrides: Sequence[str], error: Exception) -> None:
    """Print why a command line cannot run. It leaves a folder only where it names one, which gets a status.

    Args:
        overrides: The command line.
        error: The reason.
    """
    print_error(error)
    folder = named_folder(overrides)
    if folder is not None:
        with suppress(RunFolderError):
            RunFolder.claim(folder).finish(Status("failed", str(error)))


def refuse(folder: Path, error: Exception) -> JobResult:
    """End a job of a sweep that never started: print one line, and write a status in the folder that it would have.

    Args:
        folder: The folder that the job would have.
        error: The reason.

    Returns:
        The job, which failed. It owns the folder unless another run is in it.
    """
    print_error(error)
    status = Status("failed", str(error))
    try:
        RunFolder.claim(folder, again=True).finish(status)
    except RunFolderError:
        return JobResult(folder, status, owns_folder=False)
    return JobResult(folder, status)


def status_from_error(error: BaseException) -> Status:
    """Return the state and the one-line message of an exception."""
    if isinstance(error, KeyboardInterrupt):
        return Status("cancelled", "interrupted")
    if isinstance(error, RequestFailed | EngineGone):
        return Status(error.kind if error.kind in STATES else "failed", str(error).splitlines()[0])
    return Status(failure_kind(error), failure_line(error))


def mirror(log: Callable[[], None]) -> bool:
    """Log a run to wandb; an error there is printed and does not fail the run.

    Args:
        log: Function that logs the run.

    Returns:
        Whether it worked.
    """
    try:
        log()
    except Exception as error:
        print_error(f"the run is on disk, but wandb did not take it: {status_from_error(error).error}")
        return False
    return True
