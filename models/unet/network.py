"""The call of every native network (models.components.Denoiser) around diffusers' UNets.

Shapes: B batch, C channels, H and W rows and columns of the latent or, for pixel-space models, of the picture.
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
"""A UNet is cut by samples and by guidance branches only: its tokens are rows and columns that convolutions mix."""


class ConditionalUNet(nn.Module):
    """Stable Diffusion's network (Rombach et al. 2022): convolutions, self-attention, cross-attention to the text."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """One evaluation (models.components.Denoiser); it reads states and mask.

        Raises:
            ValueError: no text states.
        """
        return self.unet(
            latent_BCHW, tau_B, condition.text(), encoder_attention_mask=condition.mask, return_dict=False
        )[0]


class SizedUNet(nn.Module):
    """SDXL's network (Podell et al. 2023, arXiv:2307.01952): also told a pooled text vector and the picture's size.

    Args:
        unet: with addition_embed_type=text_time.
        stride: pixels that a latent pixel spans on a side.
    """

    def __init__(self, unet: UNet2DConditionModel, stride: int) -> None:
        super().__init__()
        self.unet = unet
        self.stride = stride

    def forward(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """One evaluation (models.components.Denoiser); it reads states, mask and pooled.

        The picture counts as neither scaled nor cropped: original and target size are its own, the corner is (0, 0).

        Raises:
            ValueError: no text states or no pooled vector.
        """
        if condition.pooled is None:
            raise ValueError("this network needs a pooled text vector, and its conditioning has none")
        height, width = (side * self.stride for side in latent_BCHW.shape[-2:])
        told = (height, width, 0, 0, height, width)
        sizes_B6 = torch.stack([tau_B.new_full((len(tau_B),), side) for side in told], dim=1)
        return self.unet(
            latent_BCHW,
            tau_B,
            condition.text(),
            added_cond_kwargs={"text_embeds": condition.pooled, "time_ids": sizes_B6},
            encoder_attention_mask=condition.mask,
            return_dict=False,
        )[0]


class UnconditionalUNet(nn.Module):
    """The network of DDPM (Ho et al. 2020) and NCSN++ (Song et al. 2021), which is told the time and nothing else."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """One evaluation (models.components.Denoiser); it reads nothing of the conditioning."""
        return self.unet(latent_BCHW, tau_B, return_dict=False)[0]


def recordable(network: nn.Module) -> bool:
    """Components.recordable of these networks: diffusers makes the filters of NCSN++ on the CPU in every forward."""
    return not any(isinstance(module, FirDownsample2D | FirUpsample2D) for module in network.modules())
