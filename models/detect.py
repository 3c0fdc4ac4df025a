"""Detection of what an unknown folder is: a checkpoint of which architecture, or one component of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from models.files import CheckpointError, read_json
from models.registry import ARCHITECTURES, Architecture

DENOISERS = ("transformer", "unet")


def class_name(folder: Path) -> str | None:
    """Return the class in a component's config.json, in diffusers' or transformers' key; None if there is none."""
    try:
        config = read_json(folder / "config.json")
    except CheckpointError:
        return None
    listed = config.get("architectures")
    name = config.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else None)
    return None if name is None else str(name)


def pipeline_name(folder: Path) -> str | None:
    """Return the pipeline in a checkpoint's model_index.json; None if it cannot be read."""
    try:
        return str(read_json(folder / "model_index.json").get("_class_name"))
    except CheckpointError:
        return None


def is_component(folder: Path) -> bool:
    """Return whether a folder is one component, and so not a checkpoint."""
    return (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()


def matching_architectures(folder: Path, denoiser: str) -> list[str]:
    """Return the architectures that match a checkpoint's denoiser and its other components.

    Args:
        folder: The checkpoint.
        denoiser: The denoiser's folder, tried before the usual ones.
    """
    name = next((found for part in (denoiser, *DENOISERS) if (found := class_name(folder / part))), None)
    return [key for key, row in ARCHITECTURES.items() if name in row.classes and _has_its_text_encoders(folder, row)]


def denoiser_class(folder: Path, denoiser: str) -> str | None:
    """Return the class of a checkpoint's denoiser, in any of its possible folders."""
    return next((found for part in (denoiser, *DENOISERS) if (found := class_name(folder / part))), None)


def _has_its_text_encoders(folder: Path, row: Architecture) -> bool:
    """Return whether the text encoders are exactly those of an architecture."""
    there = {part.name for part in folder.glob("text_encoder*") if (part / "config.json").is_file()}
    known = {name for name in row.weights if name.startswith("text_encoder")}
    return known - set(row.optional) <= there <= known
