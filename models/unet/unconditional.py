"""A checkpoint that generates pixels without a prompt: DDPM and NCSN++."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models.attention import AttentionKernel, sdpa_attention
from models.checkpoint_source import CheckpointSource
from models.components import Components, GuidanceRule, LatentSpace
from models.prompt_rules import check_no_prompt
from models.unet.network import UnconditionalUNet, capturable
from models.unet.prompts import UnconditionalPrompts
from models.unet.weights import load_unconditional

UNIT_RANGE = ("ScoreSdeVePipeline",)
"""Pipelines of diffusers whose data is in [0, 1]; all others have it in [-1, 1]."""


@dataclass(frozen=True)
class PixelDecoder:
    """A decoder for pixel-space models, whose state is the image: in [-1, 1] if it is centered, else in [0, 1]."""

    centered: bool

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Return pixels (B, 3, height, width), float32 in [0, 1]."""
        pixels = x_BCHW.float()
        return (pixels / 2 + 0.5 if self.centered else pixels).clamp(0, 1)


def load_denoiser(source: CheckpointSource, kernel: AttentionKernel = sdpa_attention) -> UnconditionalUNet:
    """Load the network alone.

    Returns:
        The network.

    Raises:
        CheckpointError: A configuration that it cannot be built from, or weights that do not fit it.
    """
    return UnconditionalUNet(load_unconditional(source, kernel))


def load(source: CheckpointSource, kernel: AttentionKernel) -> Components:
    """Load the components of a checkpoint in the layout of diffusers' DDPMPipeline or ScoreSdeVePipeline.

    Returns:
        The components.

    Raises:
        CheckpointError: A component that is missing, unreadable or does not fit.
    """
    network = load_denoiser(source, kernel)
    config = network.unet.config
    return Components(
        network=network,
        load_prompts=UnconditionalPrompts,
        decoder=PixelDecoder(centered=source.index().get("_class_name") not in UNIT_RANGE),
        latent=LatentSpace(config.in_channels, 1),
        size_multiple=2 ** (len(config.block_out_channels) - 1),
        guidance=GuidanceRule(possible=False),
        check_prompt=check_no_prompt,
        capturable=capturable(network),
    )
