"""Loading of diffusers' UNets, and the configurations of them that these wrappers support.

diffusers builds the network from its configuration; rejected here are networks with inputs that no stage provides.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from models.attention import AttentionKernel
from models.checkpoint_source import CheckpointSource
from models.decoders import load_from_diffusers
from models.files import CheckpointError
from models.unet.attention import route_attention

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


def load_conditional(source: CheckpointSource, kernel: AttentionKernel, addition: str | None) -> UNet2DConditionModel:
    """Load a UNet that attends to text.

    Args:
        source: The checkpoint.
        kernel: The kernel of every attention layer.
        addition: The addition_embed_type that the network must have.

    Returns:
        The UNet.

    Raises:
        CheckpointError: Another class, an option that is not supported, or weights that do not fit.
    """
    raw, path = source.config(source.denoiser), source.config_folder(source.denoiser) / "config.json"
    _refuse(raw, path, "UNet2DConditionModel")
    found = raw.get("addition_embed_type")
    if found != addition:
        model = "sdxl" if found == "text_time" else "sd"
        hint = f"; use model.architecture={model}" if found in (None, "text_time") else ", which is not supported"
        raise CheckpointError(f"{path}: addition_embed_type={found}{hint}")
    unet = load_from_diffusers(source, source.denoiser, UNet2DConditionModel)
    route_attention(unet, kernel, str(path))
    return unet


def load_unconditional(source: CheckpointSource, kernel: AttentionKernel) -> UNet2DModel:
    """Load a UNet that is conditioned on the time only.

    Returns:
        The UNet.

    Raises:
        CheckpointError: Another class, an option that is not supported, or weights that do not fit.
    """
    raw, path = source.config(source.denoiser), source.config_folder(source.denoiser) / "config.json"
    _refuse(raw, path, "UNet2DModel")
    unet = load_from_diffusers(source, source.denoiser, UNet2DModel)
    route_attention(unet, kernel, str(path))
    return unet


def _refuse(raw: Mapping[str, object], path: Path, kind: str) -> None:
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
