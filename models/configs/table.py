"""What a launcher checks of a denoiser's config.json, and the tensors that it then expects; without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from models.configs.shapes import TensorShapes
from models.registry import ARCHITECTURES
from schedulers.registry import imported


def expected_tensors(architecture: str, folder: Path) -> TensorShapes | None:
    """Check a denoiser's config.json, and return the shapes of its tensors by published name.

    Args:
        architecture: The name of the architecture.
        folder: The denoiser's folder.

    Returns:
        The shapes; None for a UNet, which diffusers builds, and for a plug-in's network without a table.

    Raises:
        CheckpointError: An option that the network does not support.
    """
    target = ARCHITECTURES[architecture].tensors
    if target is None:
        return None
    expected: Callable[[Path], TensorShapes | None] = imported(target)
    return expected(folder)
