"""Which configurations of diffusers' UNets these wrappers run, and loading them.

Everything that shapes the network is diffusers' own to build; what is refused here are inputs that it is never given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from models.attention import AttentionKernel
from models.decoders import load_from_diffusers
from models.files import CheckpointError
from models.source import Source
from models.unet.attention import route_attention

OTHER_INPUTS: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "class_embed_type": ("it is told classes", ()),
    "num_class_embeds": ("it is told classes", ()),
    "time_cond_proj_dim": ("it is told the guidance scale", ()),
    "encoder_hid_dim_type": ("it is told pictures", ("text_proj",)),
    "dual_cross_attention": ("it is told two texts", (False,)),
    "attention_type": ("it is told boxes or pictures", ("default",)),
    "time_embedding_type": ("it is told whole numbers only", ("positional", "fourier")),
}
"""Options of a UNet's configuration with what they ask for, and the values beside null that ask for nothing."""


def load_conditional(source: Source, kernel: AttentionKernel, addition: str | None) -> UNet2DConditionModel:
    """A UNet that attends to text.

    Args:
        source: the checkpoint.
        kernel: of every attention layer.
        addition: addition_embed_type that the network must have.

    Raises:
        CheckpointError: another class, an option that is not supported, or weights that do not fit.
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


def load_unconditional(source: Source, kernel: AttentionKernel) -> UNet2DModel:
    """A UNet that is told the time alone.

    Raises:
        CheckpointError: another class, an option that is not supported, or weights that do not fit.
    """
    raw, path = source.config(source.denoiser), source.config_folder(source.denoiser) / "config.json"
    _refuse(raw, path, "UNet2DModel")
    unet = load_from_diffusers(source, source.denoiser, UNet2DModel)
    route_attention(unet, kernel, str(path))
    return unet


def _refuse(raw: Mapping[str, object], path: Path, kind: str) -> None:
    if raw.get("_class_name") != kind:
        raise CheckpointError(f"{path}: _class_name is {raw.get('_class_name')!r}, this network loads {kind}")
    for name, (why, harmless) in OTHER_INPUTS.items():
        value = raw.get(name)
        if value is not None and value not in harmless:
            raise CheckpointError(f"{path}: {name}={value} is not supported ({why})")
    if raw.get("in_channels") != raw.get("out_channels"):
        raise CheckpointError(
            f"{path}: in_channels={raw.get('in_channels')} and out_channels={raw.get('out_channels')}; networks for "
            "inpainting or with a learned variance are not supported"
        )
