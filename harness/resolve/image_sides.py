"""Whether a checkpoint can generate the sides of the request, from its config.json files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.config.schema import RunConfig
from harness.resolve.checkpoint import CheckpointLayout
from harness.resolve.limits import check_largest_side
from harness.resolve.request import to_message
from models.configs.image_sizes import largest_side, token_side
from models.files import read_json


def check_image_sides(config: RunConfig, layout: CheckpointLayout, denoiser: str) -> None:
    """Refuse a multiple of image sizes that the checkpoint's tokens do not divide, and a side beyond its positions.

    Args:
        config: The configuration.
        layout: The place of each component on disk.
        denoiser: The folder of the denoiser in the checkpoint.

    Raises:
        ValueError: One line says what to set, or how large an image may be.
    """
    network, vae = _config(layout.config_folder(denoiser)), _config(layout.config_folder("vae"))
    side = token_side(config.model.architecture, network, vae)
    if side is not None:
        check_size_multiple(config.model.size_multiple, side)
        check_largest_side(to_message(config.request), largest_side(config.model.architecture, network, side))


def check_size_multiple(multiple: int, side: int) -> None:
    """Refuse a multiple of image sizes that the tokens do not divide.

    Args:
        multiple: The key model.size_multiple.
        side: The pixels of a token on a side.

    Raises:
        ValueError: One line says what to set.
    """
    if multiple % side:
        raise ValueError(
            f"model.size_multiple={multiple}, but this checkpoint generates multiples of {side} pixels; set "
            f"model.size_multiple={side}"
        )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}
