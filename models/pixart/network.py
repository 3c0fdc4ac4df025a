"""The network: patches of a latent attend to one another and to the text, modulated by the timestep.

adaLN-single, cross-attention and sine-cosine positions as in PixArt-alpha (Chen et al. 2023, arXiv:2310.00426, section
2.3), so that a checkpoint is interchangeable with diffusers' `PixArtTransformer2DModel`.

Shapes: B batch, H and W latent rows and columns, C latent channels, L image tokens, S text tokens, D width, T text
channels, E sinusoids, F a third of the width, P outputs a patch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import AttentionKernel, sdpa_attention
from models.components import Conditioning, text_of, told_of
from models.layers import (
    Attention,
    FeedForward,
    modulate,
    plain_norm,
    sincos_positions_2d,
    timestep_embedding,
    unpatchify,
)

TIME_CHANNELS = 256


@dataclass(frozen=True)
class PixArtConfig:
    """The sizes of one network.

    Args:
        depth: transformer blocks.
        heads: attention heads; the width is heads * head_channels.
        head_channels: channels a head.
        in_channels: latent channels.
        out_channels: channels of the output, twice as many where it learned a variance too.
        patch: side of a patch, in latent pixels.
        sample_size: side of the training latent, in latent pixels; positions are measured against it.
        text_channels: channels of a text state.
        position_scale: positions are divided by it (diffusers' interpolation_scale; 2 for PixArt's 1024-pixel
            checkpoints).
        told_size: the picture's height, width and aspect ratio are embedded with the time (PixArt-alpha's 1024-pixel
            checkpoints; diffusers' use_additional_conditions).
        stride: pixels a latent pixel spans on a side, for that size.
        norm_eps: of the norms in the blocks.
    """

    depth: int = 6
    heads: int = 8
    head_channels: int = 32
    in_channels: int = 4
    out_channels: int = 4
    patch: int = 2
    sample_size: int = 16
    text_channels: int = 256
    position_scale: float = 1.0
    told_size: bool = False
    stride: int = 8
    norm_eps: float = 1e-6

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_channels


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; shift, scale and gate from one shared modulation."""

    def __init__(self, config: PixArtConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        width = config.width
        self.norm_eps = config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.self_attention = Attention(width, config.heads, kernel)
        self.cross_attention = Attention(width, config.heads, kernel)
        self.feed_forward = FeedForward(width)

    def forward(self, x_BLD: Tensor, modulation_B6D: Tensor, text_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        table = self.scale_shift_table + modulation_B6D
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.unsqueeze(2).unbind(1)
        x = x_BLD
        x = x + gate_a * self.self_attention(modulate(plain_norm(x, self.norm_eps), shift_a, scale_a))
        x = x + self.cross_attention(x, text_BSD, mask_BS)
        return x + gate_f * self.feed_forward(modulate(plain_norm(x, self.norm_eps), shift_f, scale_f))


class SizeEmbedding(nn.Module):
    """What the network is told of the picture: height, width and their ratio, each of them a third of the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.side_in = nn.Linear(TIME_CHANNELS, width // 3)
        self.side_out = nn.Linear(width // 3, width // 3)
        self.ratio_in = nn.Linear(TIME_CHANNELS, width // 3)
        self.ratio_out = nn.Linear(width // 3, width // 3)

    def forward(self, height: int, width: int, like: Tensor) -> Tensor:
        """(1, D) for a picture of height x width pixels, in `like`'s dtype and on its device."""
        told = torch.cat([like.new_full((1,), x, dtype=torch.float32) for x in (height, width, height / width)])
        sides_2E, ratio_1E = timestep_embedding(told, TIME_CHANNELS).to(like.dtype).split([2, 1])
        sides_2F = self.side_out(F.silu(self.side_in(sides_2E)))
        ratio_1F = self.ratio_out(F.silu(self.ratio_in(ratio_1E)))
        return torch.cat([sides_2F, ratio_1F]).flatten()[None]


class PixArt(nn.Module):
    """A text-conditioned diffusion transformer: (latent, tau, text) to the network's raw output, a latent.

    Args:
        config: the sizes.
        kernel: the attention of every block (models.attention).

    Source: PixArt-alpha (arXiv:2310.00426); the weights' meaning is that of diffusers' `PixArtTransformer2DModel`.
    """

    def __init__(self, config: PixArtConfig, kernel: AttentionKernel = sdpa_attention) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.patch_embed = nn.Conv2d(config.in_channels, width, kernel_size=config.patch, stride=config.patch)
        self.time_in = nn.Linear(TIME_CHANNELS, width)
        self.time_out = nn.Linear(width, width)
        self.size = SizeEmbedding(width) if config.told_size else None
        self.time_modulation = nn.Linear(width, 6 * width)
        self.text_in = nn.Linear(config.text_channels, width)
        self.text_out = nn.Linear(width, width)
        self.blocks = nn.ModuleList([Block(config, kernel) for _ in range(config.depth)])
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.project_out = nn.Linear(width, config.patch**2 * config.out_channels)

    def forward(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """One evaluation (models.components.Denoiser); it reads states and mask.

        Raises:
            ValueError: no text states.
        """
        text_BSD, text_mask_BS = text_of(self, condition)
        height, width = (side // self.config.patch for side in latent_BCHW.shape[-2:])
        x_BLD = self.patch_embed(latent_BCHW).flatten(2).transpose(1, 2)
        config, base = self.config, self.config.sample_size // self.config.patch
        x_BLD = x_BLD + sincos_positions_2d(
            height, width, config.width, base, config.position_scale, x_BLD.dtype, x_BLD.device
        )
        told_B7D = told_of(self, latent_BCHW, tau_B, condition)
        modulation_B6D, time_B1D = told_B7D.split([6, 1], dim=1)
        for block in self.blocks:
            x_BLD = block(x_BLD, modulation_B6D, text_BSD, text_mask_BS)
        shift, scale = (self.scale_shift_table + time_B1D).unsqueeze(2).unbind(1)
        y_BLP = self.project_out(modulate(plain_norm(x_BLD), shift, scale))
        return unpatchify(y_BLP, height, width, self.config.patch)

    def tell(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """The modulation that all blocks share, and the time (models.components.AheadNetwork)."""
        sines_BE = timestep_embedding(tau_B, TIME_CHANNELS).to(latent_BCHW.dtype)
        time_BD = self.time_out(F.silu(self.time_in(sines_BE)))
        if self.size is not None:
            pixels = [side * self.config.stride for side in latent_BCHW.shape[-2:]]
            time_BD = time_BD + self.size(*pixels, time_BD)
        modulation_B6D = self.time_modulation(F.silu(time_BD)).unflatten(-1, (6, -1))
        return torch.cat([modulation_B6D, time_BD[:, None]], dim=1)

    def read(self, condition: Conditioning) -> Conditioning:
        """The text in the network's width (models.components.AheadNetwork)."""
        text_BSD = self.text_out(F.gelu(self.text_in(condition.text()), approximate="tanh"))
        return replace(condition, states=None, context=text_BSD)
