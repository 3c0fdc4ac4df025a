"""Wrappers that give diffusers' UNets the call of every native network (models.components.Denoiser).

Shapes: B batch, C channels, H and W rows and columns of the latent or, for pixel-space models, of the image.
"""

from __future__ import annotations

import torch
from diffusers.models.downsampling import FirDownsample2D
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import FirUpsample2D
from torch import Tensor, nn

from models.components import Conditioning
from models.plan import ParallelPlan

PLAN = ParallelPlan()
"""A UNet is sharded by samples and guidance branches only: convolutions mix the rows and columns of its tokens."""


class ConditionalUNet(nn.Module):
    """Stable Diffusion's network (Rombach et al. 2022): convolutions, self-attention, cross-attention to the text."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Evaluate the network once (models.components.Denoiser); it reads prompt_embeds and mask.

        Returns:
            The raw output, (B, C, H, W).

        Raises:
            ValueError: No prompt embeddings.
        """
        return self.unet(
            latent_BCHW,
            tau_B,
            condition.require_prompt_embeds(),
            encoder_attention_mask=condition.mask,
            return_dict=False,
        )[0]


class SizeConditionedUNet(nn.Module):
    """SDXL's network (Podell et al. 2023, arXiv:2307.01952), conditioned on a pooled text vector and the image size.

    Args:
        unet: The diffusers network, with addition_embed_type=text_time.
        stride: The number of image pixels per latent pixel, along a side.
    """

    def __init__(self, unet: UNet2DConditionModel, stride: int) -> None:
        super().__init__()
        self.unet = unet
        self.stride = stride

    def forward(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Evaluate the network once (models.components.Denoiser); it reads prompt_embeds, mask and pooled.

        The image counts as neither scaled nor cropped: original and target size are its own, the corner is (0, 0).

        Returns:
            The raw output, (B, C, H, W).

        Raises:
            ValueError: No prompt embeddings or no pooled vector.
        """
        if condition.pooled is None:
            raise ValueError("this network needs a pooled text vector, but its conditioning has none")
        height, width = (side * self.stride for side in latent_BCHW.shape[-2:])
        sizes = (height, width, 0, 0, height, width)
        sizes_B6 = torch.stack([tau_B.new_full((len(tau_B),), side) for side in sizes], dim=1)
        return self.unet(
            latent_BCHW,
            tau_B,
            condition.require_prompt_embeds(),
            added_cond_kwargs={"text_embeds": condition.pooled, "time_ids": sizes_B6},
            encoder_attention_mask=condition.mask,
            return_dict=False,
        )[0]


class UnconditionalUNet(nn.Module):
    """The network of DDPM (Ho et al. 2020) and NCSN++ (Song et al. 2021), conditioned on the time only."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Evaluate the network once (models.components.Denoiser); it reads nothing of the conditioning."""
        return self.unet(latent_BCHW, tau_B, return_dict=False)[0]


def capturable(network: nn.Module) -> bool:
    """Return Components.capturable of a UNet: diffusers builds NCSN++'s filters on the CPU in every forward."""
    return not any(isinstance(module, FirDownsample2D | FirUpsample2D) for module in network.modules())
