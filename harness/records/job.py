"""The outcome of one job of a sweep: what a table, a mirror or a sweeper shows of it, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from harness.records.comparison import Comparison, read_comparison
from harness.records.record import Record, Status, read_record, write_atomically


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
