"""What a folder of unknown origin is: a checkpoint of which architecture, or one component of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from models.files import CheckpointError, read_json
from models.registry import ARCHITECTURES, Architecture

DENOISERS = ("transformer", "unet")


def class_name(folder: Path) -> str | None:
    """What the config.json of a component says it is, in diffusers' words or transformers'."""
    try:
        config = read_json(folder / "config.json")
    except CheckpointError:
        return None
    listed = config.get("architectures")
    name = config.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else None)
    return None if name is None else str(name)


def pipeline_name(folder: Path) -> str | None:
    """The pipeline that a checkpoint's model_index.json names."""
    try:
        return str(read_json(folder / "model_index.json").get("_class_name"))
    except CheckpointError:
        return None


def is_component(folder: Path) -> bool:
    """Whether a folder is one component, and so no checkpoint."""
    return (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()


def architectures_of(folder: Path, denoiser: str) -> list[str]:
    """The architectures that a checkpoint's denoiser and its other components fit.

    Args:
        folder: the checkpoint.
        denoiser: its folder, beside the usual ones.
    """
    name = next((found for part in (denoiser, *DENOISERS) if (found := class_name(folder / part))), None)
    return [key for key, row in ARCHITECTURES.items() if name in row.classes and _has_the_parts(folder, row)]


def denoiser_class(folder: Path, denoiser: str) -> str | None:
    """The class of a checkpoint's denoiser, wherever it is."""
    return next((found for part in (denoiser, *DENOISERS) if (found := class_name(folder / part))), None)


def _has_the_parts(folder: Path, row: Architecture) -> bool:
    """Whether the text encoders are those of an architecture: neither more nor fewer."""
    there = {part.name for part in folder.glob("text_encoder*") if (part / "config.json").is_file()}
    known = {name for name in row.weights if name.startswith("text_encoder")}
    return known - set(row.optional) <= there <= known
