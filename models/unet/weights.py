"""Loading of diffusers' UNets; diffusers builds the network from its configuration."""

from __future__ import annotations

from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from models.attention import AttentionKernel
from models.checkpoint_source import CheckpointSource
from models.configs.unet import check_conditional, check_unconditional
from models.decoders import load_from_diffusers
from models.unet.attention import route_attention


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
    folder = source.config_folder(source.denoiser)
    check_conditional(folder, addition)
    unet = load_from_diffusers(source, source.denoiser, UNet2DConditionModel)
    route_attention(unet, kernel, str(folder / "config.json"))
    return unet


def load_unconditional(source: CheckpointSource, kernel: AttentionKernel) -> UNet2DModel:
    """Load a UNet that is conditioned on the time only.

    Returns:
        The UNet.

    Raises:
        CheckpointError: Another class, an option that is not supported, or weights that do not fit.
    """
    folder = source.config_folder(source.denoiser)
    check_unconditional(folder)
    unet = load_from_diffusers(source, source.denoiser, UNet2DModel)
    route_attention(unet, kernel, str(folder / "config.json"))
    return unet
