"""One job of a sweep: its outcome, for what shows or mirrors it, and `job.json`, the number of the job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from harness.records.comparison import Comparison, read_comparison
from harness.records.record import Record, RunFolder, Status, read_record, write_atomically

FILE = "job.json"


@dataclass(frozen=True)
class JobResult:
    """The outcome of one job.

    Attributes:
        folder: The run's folder.
        status: How the run ended.
        already_done: Whether an earlier command had done this job, so that it was skipped.
        owns_folder: Whether what lies in the folder is this job's. It is not if the folder holds another run.
        overrides: The job's overrides, as Hydra has them; empty if it is no job of a sweep.
    """

    folder: Path
    status: Status
    already_done: bool = False
    owns_folder: bool = True
    overrides: tuple[str, ...] = ()

    def record(self) -> Record | None:
        """Return the record of this job, or None if it left none."""
        return read_record(self.folder) if self.owns_folder else None

    def comparison(self) -> Comparison | None:
        """Return the comparison of this job, or None if it left none."""
        return read_comparison(self.folder) if self.owns_folder else None


def write_job(path: Path, job: JobResult) -> None:
    """Write the outcome of a job that ran in a process of its own, for the process that started the sweep."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, msgspec.json.encode(job, enc_hook=str))


def read_jobs(folder: Path) -> list[JobResult]:
    """Return the outcomes that jobs wrote to a folder, in the order of their files' names."""
    files: Sequence[Path] = sorted(folder.glob("*.json"))
    return [
        msgspec.json.decode(file.read_bytes(), type=JobResult, dec_hook=lambda kind, value: kind(value))
        for file in files
    ]


class SweepJob(msgspec.Struct, frozen=True):
    """`job.json`: which job of which sweep a folder is of, whether the job went well or not.

    Attributes:
        sweep: Name of the sweep, which is its group in wandb.
        job: Number of the job, as Hydra counts them from 0.
        overrides: The job's overrides.
    """

    sweep: str
    job: int
    overrides: list[str]


def sweep_group(folder: Path) -> str:
    """Return the name of a sweep: the last two parts of its folder, such as 2026-01-31-12-00-00."""
    return "-".join(folder.parts[-2:])


def write_sweep_job(job: JobResult, sweep: Path, number: int) -> None:
    """Write which job a folder is of, unless the folder is another job's or an earlier command did the job.

    Args:
        job: A finished job.
        sweep: Folder of the sweep.
        number: Number of the job in the sweep.

    Raises:
        RunFolderError: The file cannot be written.
    """
    if job.owns_folder and not job.already_done:
        RunFolder(job.folder).write_json(FILE, SweepJob(sweep_group(sweep), number, list(job.overrides)))


def read_sweep_job(folder: Path) -> SweepJob | None:
    """Return which job a folder is of, or None if it does not say."""
    try:
        return msgspec.json.decode((folder / FILE).read_bytes(), type=SweepJob)
    except (OSError, msgspec.MsgspecError):
        return None
