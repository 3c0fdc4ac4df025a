"""Which jobs of a sweep ran at the same time on one machine, so that their times are not those of a machine alone.

Each job leaves its beginning and its end in a hidden folder of the sweep. A lock says that a job still runs.
"""

from __future__ import annotations

import platform
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from harness.records.comparison import FILE
from harness.records.job import JobResult
from harness.records.record import RunFolder, lock_file, write_atomically

RUNNING = ".running"
SHOWN_JOBS = 3  # names in a note; the record has all


class JobTime(msgspec.Struct, frozen=True):
    """When a job ran, in seconds of the clock of its host; `ended` is None while it runs."""

    job: str
    host: str
    started: float
    ended: float | None = None


@contextmanager
def running_job(sweep: Path, job: str) -> Iterator[Callable[[], list[str]]]:
    """Note that a job of a sweep runs while the context is open. A job that raises an error leaves no note.

    Args:
        sweep: Folder of the sweep.
        job: Name of the job's folder.

    Yields:
        A function that returns the other jobs that ran on this machine since this one began.
    """
    (sweep / RUNNING).mkdir(0o700, parents=True, exist_ok=True)
    file = sweep / RUNNING / f"{secrets.token_hex(8)}.json"
    own = JobTime(job, platform.node(), time.time())
    with lock_file(_lock(file)):
        write_atomically(file, msgspec.json.encode(own))
        try:
            yield lambda: _jobs_beside(file, own)
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        write_atomically(file, msgspec.json.encode(msgspec.structs.replace(own, ended=time.time())))


def _lock(file: Path) -> Path:
    return file.with_suffix(".lock")


def _jobs_beside(file: Path, own: JobTime) -> list[str]:
    """Return the jobs that ran on the host of one job between its beginning and now, by name."""
    found = []
    for other in file.parent.glob("*.json"):
        if other == file:
            continue
        job = msgspec.json.decode(other.read_bytes(), type=JobTime)
        overlaps = _is_locked(_lock(other)) if job.ended is None else job.ended > own.started
        if job.host == own.host and overlaps:
            found.append(job.job)
    return sorted(found)


def _is_locked(file: Path) -> bool:
    """Return whether a living process holds a lock."""
    try:
        lock_file(file).close()
    except BlockingIOError:
        return True
    return False


def note_beside(job: JobResult, beside: Sequence[str]) -> None:
    """Write into the record or the comparison of a job which others ran beside it; nothing if none did.

    Args:
        job: A finished job.
        beside: Names of the other jobs.
    """
    if not beside or not job.owns_folder:
        return
    names = ", ".join(beside[:SHOWN_JOBS]) + (" ..." if len(beside) > SHOWN_JOBS else "")
    count = f"{len(beside)} other job{'s' if len(beside) > 1 else ''}"
    note = f"{count} of the sweep ran at the same time on this machine ({names}); their times mix"
    folder, record, comparison = RunFolder(job.folder), job.record(), job.comparison()
    if record is not None:
        folder.write_record(msgspec.structs.replace(record, beside=list(beside), notes=[*record.notes, note]))
    if comparison is not None:
        folder.write_json(FILE, msgspec.structs.replace(comparison, notes=[*comparison.notes, note]))
