"""The life of a task in its folder: whatever happens, a status is written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from harness.engines.protocol import RequestFailed
from harness.loggers.wandb import log_failure
from harness.records.record import STATES, RunFolder, RunFolderError, Status
from harness.resolve.compose import ResolvedRun, to_dict
from harness.serving.faults import failure_kind, failure_line
from harness.serving.transport import EngineGone
from harness.tasks.terminal import complain

T = TypeVar("T")


def ended(
    composed: ResolvedRun, folder: RunFolder, work: Callable[[], T], judge: Callable[[T], Status]
) -> tuple[Status, T | None]:
    """Does the work of a claimed folder, whatever happens; the status, which is on disk, and what came of it.

    What goes wrong is said in one line and mirrored; what comes of it is the caller's to mirror.
    """
    config = composed.config
    try:
        done = work()
    except (Exception, KeyboardInterrupt) as error:
        status = status_of(error)
        folder.finish(status)
        complain(f"{status.state}: {status.error} (see {folder.path})")
        if status.state != "cancelled":
            mirror(
                lambda: log_failure(config.logger.wandb, to_dict(config), folder.path, config.task.name.name, status)
            )
        return status, None
    status = judge(done)
    folder.finish(status)
    if status.error is not None:
        complain(f"{status.error} (see {folder.path})")
    return status, done


def refuse(folder: Path, error: Exception, again: bool = False) -> Status:
    """Ends a run that was never started: one line, and a status in the folder it would have had (`again`: also where
    another one is that did not end well).
    """
    complain(error)
    status = Status("failed", str(error))
    with suppress(RunFolderError):
        RunFolder.claim(folder, again).finish(status)
    return status


def status_of(error: BaseException) -> Status:
    """The state and the one line that an exception means."""
    if isinstance(error, KeyboardInterrupt):
        return Status("cancelled", "interrupted")
    if isinstance(error, RequestFailed | EngineGone):
        return Status(error.kind if error.kind in STATES else "failed", str(error).splitlines()[0])
    return Status(failure_kind(error), failure_line(error))


def mirror(log: Callable[[], None]) -> bool:
    """Logs a run elsewhere; what goes wrong there is said, and is not the run's failure. Whether it went well."""
    try:
        log()
    except Exception as error:
        complain(f"the run is on disk, but wandb did not take it: {status_of(error).error}")
        return False
    return True
