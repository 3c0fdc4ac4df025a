"""The runs below a folder: the status and the record of each, when it began, and which job of which sweep it was."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml

from harness.records.job import read_sweep_job, sweep_group
from harness.records.record import Record, RunFolderError, Status, read_record, read_started, read_status
from harness.records.sglang_dump import PerformanceDump, read_dump

RUN_FILES = ("status.json", "record.json")  # a folder with any of them holds a run
INSIDE = ("logs", "samples", "wandb")  # folders of a run that hold no other run
UNREADABLE = "unreadable"  # the state of a file that looks like a dump and is none that can be read
WANDB_RUN = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)")
LEVELS = 3  # a job's folder, and those of a comparison's sides below it
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast


@dataclass(frozen=True)
class TreeRun:
    """One run of a tree, or one performance dump of SGLang-Diffusion.

    Attributes:
        folder: The run's folder, or the file of a dump.
        status: How the run ended.
        record: The record; None if the run left none, or if it cannot be read.
        config: The resolved configuration, of a run without a record too if it left one.
        overrides: The overrides; None if they are not known.
        sweep: Name of the sweep, which is its wandb group; None if the run is no job of one.
        job: Number of the job in the sweep, as Hydra counts them from 0; None if it is not known.
        started: Time at which the run began, UTC, ISO 8601; empty if it is not known.
        wandb_id: Id of the run's latest wandb run; None if it has none.
        dump: The performance dump; None if this is a run of this project.
    """

    folder: Path
    status: Status
    record: Record | None = None
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] | None = None
    sweep: str | None = None
    job: int | None = None
    started: str = ""
    wandb_id: str | None = None
    dump: PerformanceDump | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The columns that every table begins with."""
        return {
            "folder": str(self.folder),
            "sweep": self.sweep,
            "job": self.job,
            "state": self.status.state,
            "error": self.status.error,
            "started_at": self.started or None,
            "wandb_id": self.wandb_id,
        }


def read_runs(path: Path) -> list[TreeRun]:
    """Read every run below a folder, and every performance dump beside them.

    Args:
        path: A run's folder, a sweep's, any folder above them, or the file of a dump.

    Returns:
        The runs in the order of their paths.

    Raises:
        RunFolderError: The path does not exist, or it is a file that is no dump.
    """
    if path.is_file():
        dump = read_dump(path)
        if dump is None:
            raise RunFolderError(f"{path} is no performance dump of SGLang-Diffusion; give a folder with runs")
        return [_of_dump(path, dump)]
    if not path.is_dir():
        raise RunFolderError(f"{path} does not exist; give a folder with runs, such as runs or sweeps")
    folders, others = _walk(path)
    runs = [*(read_run(folder) for folder in folders), *_dumps(others)]
    return sorted(runs, key=lambda run: run.folder)


def _walk(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders of runs, and the JSON files that belong to none."""
    folders: list[Path] = []
    others: list[Path] = []
    inside: set[str] = set()
    for name, below, files in os.walk(path):
        is_run = any(file in files for file in RUN_FILES)
        if is_run:
            folders.append(Path(name))
        if is_run or name in inside:
            inside.update(os.path.join(name, folder) for folder in below)
        else:
            others += [Path(name, file) for file in files if file.endswith(".json")]
        below[:] = [folder for folder in below if not folder.startswith(".") and not (is_run and folder in INSIDE)]
    return folders, others


def read_run(folder: Path) -> TreeRun:
    """Read one run's folder.

    Args:
        folder: The folder.

    Returns:
        The run; a record that cannot be read is its error.
    """
    status, record = read_status(folder), None
    try:
        record = read_record(folder)
    except RunFolderError as error:
        status = Status(status.state, str(error))
    job = next((job for place in _lineage(folder) if (job := read_sweep_job(place)) is not None), None)
    sweep = None if job is None else job.sweep
    if job is None and (folder.absolute().parent / "multirun.yaml").exists():
        sweep = sweep_group(folder.absolute().parent)
    return TreeRun(
        folder=folder,
        status=status,
        record=record,
        config=_config_file(folder) if record is None else record.config,
        overrides=record.overrides if record is not None else None if job is None else job.overrides,
        sweep=sweep,
        job=None if job is None else job.job,
        started=(record.provenance.started if record is not None else "") or read_started(folder),
        wandb_id=_wandb_id(folder),
    )


def _lineage(folder: Path) -> list[Path]:
    """Return a folder and those above it that may be the folder of its job."""
    return [folder, *folder.absolute().parents][:LEVELS]


def _config_file(folder: Path) -> dict[str, Any]:
    """Return the configuration of a run that left no record; empty if it left none either."""
    try:
        config = yaml.load((folder / "config.yaml").read_text(), Loader=LOADER)
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return {key: value for key, value in config.items() if key != "hardware"} if isinstance(config, dict) else {}


def _wandb_id(folder: Path) -> str | None:
    """Return the id of the latest wandb run in a run's folder, by the names that wandb gives to its folders."""
    found = [match for place in (folder / "wandb").glob("*run-*") if (match := WANDB_RUN.fullmatch(place.name))]
    return max(found, key=lambda match: match[1])[2] if found else None


def _dumps(files: list[Path]) -> Iterator[TreeRun]:
    """Yield the files that are performance dumps; one that cannot be read is a row with its error."""
    for file in files:
        try:
            dump = read_dump(file)
        except RunFolderError as error:
            yield TreeRun(file, Status(UNREADABLE, str(error)))
        else:
            if dump is not None:
                yield _of_dump(file, dump)


def _of_dump(file: Path, dump: PerformanceDump) -> TreeRun:
    return TreeRun(file, Status("ok"), config=dump.config, dump=dump)


def plain(value: msgspec.Struct | None) -> dict[str, Any]:
    """Return a struct as nested dictionaries; empty for None."""
    found: dict[str, Any] = {} if value is None else msgspec.to_builtins(value)
    return found
