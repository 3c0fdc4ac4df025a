"""A checkpoint that draws pixels without a prompt: DDPM and NCSN++."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models.attention import AttentionKernel, sdpa_attention
from models.components import Components, GuidanceRule, LatentSpace
from models.source import Source
from models.unet.network import UnconditionalUNet, recordable
from models.unet.prompts import Unconditional, check_no_prompt
from models.unet.weights import load_unconditional

UNIT_RANGE = ("ScoreSdeVePipeline",)
"""Pipelines of diffusers whose data lies in [0, 1]; that of all others in [-1, 1]."""


@dataclass(frozen=True)
class PixelDecoder:
    """The state is the picture already, in [-1, 1] where it is centered at 0, else in [0, 1]."""

    centered: bool

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Pixels (B, 3, height, width), float32 in [0, 1]."""
        pixels = x_BCHW.float()
        return (pixels / 2 + 0.5 if self.centered else pixels).clamp(0, 1)


def load_denoiser(source: Source, kernel: AttentionKernel = sdpa_attention) -> UnconditionalUNet:
    """The network alone.

    Raises:
        CheckpointError: a configuration that it cannot be built from, or weights that do not fit it.
    """
    return UnconditionalUNet(load_unconditional(source, kernel))


def load(source: Source, kernel: AttentionKernel) -> Components:
    """The components of a checkpoint in the layout of diffusers' DDPMPipeline or ScoreSdeVePipeline.

    Raises:
        CheckpointError: a component that is missing, unreadable or does not fit.
    """
    network = load_denoiser(source, kernel)
    config = network.unet.config
    return Components(
        network=network,
        load_prompts=Unconditional,
        decoder=PixelDecoder(centered=source.index().get("_class_name") not in UNIT_RANGE),
        latent=LatentSpace(config.in_channels, 1),
        size_multiple=2 ** (len(config.block_out_channels) - 1),
        guidance=GuidanceRule(possible=False),
        check_prompt=check_no_prompt,
        recordable=recordable(network),
    )
