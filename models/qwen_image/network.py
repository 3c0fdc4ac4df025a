"""The network: text and picture, each with weights of its own, attend to one another in every block.

Double-stream blocks modulated by the timestep, and positions on three axes (frame, row, column) with the picture
centred and the text on the diagonal behind it: Qwen-Image (Wu et al. 2025, arXiv:2508.02324, sections 2.3 and 2.4),
interchangeable with diffusers' `QwenImageTransformer2DModel` where that draws a picture from text alone.

Shapes: B batch, H and W latent rows and columns, C latent channels, L picture tokens, S text tokens, J = S + L, D
width, E channels a head, F = E / 2 rotary angles, P outputs a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import AttentionKernel, sdpa_attention
from models.components import Conditioning, text_of, told_of
from models.layers import (
    Embedder,
    JointBlock,
    Modulation,
    kept,
    modulate,
    plain_norm,
    rotary_angles,
    timestep_embedding,
)

TIME_CHANNELS = 256
PATCH = 2  # a token is PATCH x PATCH latent pixels
THETA = 10_000.0  # of the rotary positions


@dataclass(frozen=True)
class QwenImageConfig:
    """The sizes of one network.

    Args:
        depth: blocks.
        heads: attention heads; the width is heads * head_channels.
        head_channels: channels a head.
        latent_channels: C.
        text_channels: channels of a text state.
        axes: channels of a head that frame, row and column rotate; they add up to head_channels.
    """

    depth: int = 60
    heads: int = 24
    head_channels: int = 128
    latent_channels: int = 16
    text_channels: int = 3584
    axes: tuple[int, int, int] = (16, 56, 56)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_channels


class QwenImage(nn.Module):
    """A double-stream diffusion transformer: (latent, tau, text) to the velocity of the flow, a latent.

    Args:
        config: the sizes.
        kernel: the attention of every block (models.attention).

    Source: Qwen-Image (arXiv:2508.02324); the weights' meaning is that of diffusers' `QwenImageTransformer2DModel`.
    """

    def __init__(self, config: QwenImageConfig, kernel: AttentionKernel = sdpa_attention) -> None:
        super().__init__()
        width, token_channels = config.width, PATCH**2 * config.latent_channels
        self.config = config
        self.image_in = nn.Linear(token_channels, width)
        self.time = Embedder(TIME_CHANNELS, width)
        self.text_norm = nn.RMSNorm(config.text_channels, eps=1e-6)
        self.text_in = nn.Linear(config.text_channels, width)
        self.blocks = nn.ModuleList(
            [JointBlock(config.width, config.head_channels, kernel) for _ in range(config.depth)]
        )
        self.head_modulation = Modulation(width, 2 * width)
        self.project_out = nn.Linear(width, token_channels)

    def forward(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """One evaluation (models.components.Denoiser); it reads states and mask.

        Raises:
            ValueError: no text states.
        """
        height, width = (side // PATCH for side in latent_BCHW.shape[-2:])
        text_BSD, mask_BS = text_of(self, condition)
        x_BLD = self.image_in(F.pixel_unshuffle(latent_BCHW, PATCH).flatten(2).transpose(1, 2))
        time_BD = told_of(self, latent_BCHW, tau_B, condition)
        axes, device = self.config.axes, latent_BCHW.device
        rope_2LF = image_rope(height, width, axes, device)
        text_rope_2SF = text_rope(max(height // 2, width // 2), text_BSD.shape[1], axes, device)
        for block in self.blocks:
            x_BLD, text_BSD = block(x_BLD, text_BSD, time_BD, rope_2LF, text_rope_2SF, mask_BS)
        scale, shift = self.head_modulation(time_BD).chunk(2, dim=-1)
        y_BLP = self.project_out(modulate(plain_norm(x_BLD), shift, scale))
        return F.pixel_shuffle(y_BLP.transpose(1, 2).unflatten(2, (height, width)), PATCH)

    def tell(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """The time as a vector (models.components.AheadNetwork)."""
        # as diffusers rounds in float32; in bfloat16 it cuts tau itself to 8 bits, which is not followed
        return self.time(timestep_embedding(tau_B / 1000, TIME_CHANNELS, scale=1000.0).to(latent_BCHW.dtype))

    def read(self, condition: Conditioning) -> Conditioning:
        """The text in the network's width (models.components.AheadNetwork)."""
        return replace(condition, states=None, context=self.text_in(self.text_norm(condition.text())))


@kept
def image_rope(height: int, width: int, axes: tuple[int, int, int], device: torch.device) -> Tensor:
    """Cosines and sines of the picture's angles: frame 0, rows and columns counted from the middle. (2, L, E / 2)."""
    frame = torch.zeros(1, 1, axes[0] // 2)
    rows = rotary_angles(torch.arange(height).float() - (height + 1) // 2, axes[1], THETA)[:, None]
    columns = rotary_angles(torch.arange(width).float() - (width + 1) // 2, axes[2], THETA)[None]
    angles_LF = torch.cat([part.expand(height, width, -1) for part in (frame, rows, columns)], dim=-1).flatten(0, 1)
    return torch.stack([angles_LF.cos(), angles_LF.sin()]).to(device)


@kept
def text_rope(first: int, count: int, axes: tuple[int, int, int], device: torch.device) -> Tensor:
    """Those of the text, a token at one place on all axes, behind the last row or column. (2, S, E / 2)."""
    places_S = torch.arange(first, first + count).float()
    angles_SF = torch.cat([rotary_angles(places_S, channels, THETA) for channels in axes], dim=-1)
    return torch.stack([angles_SF.cos(), angles_SF.sin()]).to(device)
