"""The configurations of diffusers' UNets that the wrappers support; without torch.

Rejected here are networks with inputs that no stage provides.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from models.files import CheckpointError, read_json

OTHER_INPUTS: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "class_embed_type": ("it is conditioned on classes", ()),
    "num_class_embeds": ("it is conditioned on classes", ()),
    "time_cond_proj_dim": ("it is conditioned on the guidance scale", ()),
    "encoder_hid_dim_type": ("it is conditioned on images", ("text_proj",)),
    "dual_cross_attention": ("it is conditioned on two texts", (False,)),
    "attention_type": ("it is conditioned on boxes or images", ("default",)),
    "time_embedding_type": ("it takes whole timesteps only", ("positional", "fourier")),
}
"""Options of a UNet's configuration: the input that each one adds, and the values besides null that add none."""


def check_conditional(folder: Path, addition: str | None) -> None:
    """Raise an error for a UNet that attends to text, if it is not supported.

    Args:
        folder: The network's folder.
        addition: The addition_embed_type that the network must have.

    Raises:
        CheckpointError: Another class, or an option that is not supported.
    """
    path = folder / "config.json"
    raw = read_json(path)
    _check_inputs(raw, path, "UNet2DConditionModel")
    found = raw.get("addition_embed_type")
    if found != addition:
        model = "sdxl" if found == "text_time" else "sd"
        hint = f"; use model.architecture={model}" if found in (None, "text_time") else ", which is not supported"
        raise CheckpointError(f"{path}: addition_embed_type={found}{hint}")


def check_unconditional(folder: Path) -> None:
    """Raise an error for a UNet that is conditioned on the time only, if it is not supported.

    Raises:
        CheckpointError: Another class, or an option that is not supported.
    """
    path = folder / "config.json"
    _check_inputs(read_json(path), path, "UNet2DModel")


def check_sd(folder: Path) -> None:
    """Raise an error for a UNet of Stable Diffusion that is not supported. Raises CheckpointError."""
    check_conditional(folder, None)


def check_sdxl(folder: Path) -> None:
    """Raise an error for a UNet of SDXL that is not supported. Raises CheckpointError."""
    check_conditional(folder, "text_time")


def _check_inputs(raw: Mapping[str, object], path: Path, kind: str) -> None:
    if raw.get("_class_name") != kind:
        raise CheckpointError(f"{path}: _class_name is {raw.get('_class_name')!r}, this network loads {kind}")
    for name, (why, allowed) in OTHER_INPUTS.items():
        value = raw.get(name)
        if value is not None and value not in allowed:
            raise CheckpointError(f"{path}: {name}={value} is not supported ({why})")
    if raw.get("in_channels") != raw.get("out_channels"):
        raise CheckpointError(
            f"{path}: in_channels={raw.get('in_channels')} and out_channels={raw.get('out_channels')}; networks for "
            "inpainting or with a learned variance are not supported"
        )
