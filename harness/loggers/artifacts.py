"""Files of a run as artifacts of its wandb run: the record, the samples, and the page of a report.

The files are uploaded from where they lie, without a copy. So a folder that was logged offline must stay until
`wandb sync` has uploaded it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from harness.records.record import SampleRow

if TYPE_CHECKING:
    import wandb

RECORD_FILES = (
    *("record.json", "comparison.json", "config.yaml", "status.json"),
    *("images.jsonl", "requests.jsonl", "a/record.json", "b/record.json"),
)


def log_record_files(run: wandb.Run, folder: Path, metadata: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Log what a run's folder holds of its record.

    Args:
        run: The open run.
        folder: The run's folder.
        metadata: What wandb shows beside the files.
    """
    log_files(run, "record", folder, RECORD_FILES, metadata)


def log_samples(run: wandb.Run, folder: Path, samples: Sequence[SampleRow]) -> None:
    """Log the images or videos that a record names, and the grid.

    Args:
        run: The open run.
        folder: The run's folder.
        samples: The record's samples; of a data set, those of the grid.
    """
    log_files(run, "samples", folder, ["grid.png", *(row.path for row in samples)])


def log_files(
    run: wandb.Run,
    kind: str,
    folder: Path,
    paths: Iterable[str],
    metadata: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Log files as one artifact, named after the run; nothing if none of them is there.

    Args:
        run: The open run.
        kind: Type of the artifact.
        folder: Folder of the files.
        paths: The files' paths in the folder; one that is missing is left out.
        metadata: What wandb shows beside the files.
    """
    import wandb

    present = [path for path in dict.fromkeys(paths) if (folder / path).is_file()]
    if not present:
        return
    artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind, metadata=dict(metadata))
    for path in present:
        artifact.add_file(str((folder / path).resolve()), name=path, policy="immutable")
    run.log_artifact(artifact)
