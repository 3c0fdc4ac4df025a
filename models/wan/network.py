"""The network: patches of a video latent attend to one another, with rotary positions in time, height and width, and
to the text, modulated by the timestep.

Wan (Wan Team 2025, arXiv:2503.20314, section 4.2), so that a checkpoint is interchangeable with diffusers'
`WanTransformer3DModel`. In bfloat16 the time embedding, the modulation, the layer norms, the rotation and the residual
sums are float32, as the checkpoint was trained.

Shapes: B batch, C latent channels, F latent frames, H and W latent rows and columns, L video tokens (frame by frame,
row by row), S text tokens, D width, A attention heads, E channels a head, T text channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import AttentionKernel, sdpa_attention
from models.components import Conditioning, text_of, told_of
from models.layers import FeedForward, Projections, kept, modulate, rotate, timestep_embedding

THETA = 10_000.0  # of the rotary positions


@dataclass(frozen=True)
class WanConfig:
    """The sizes of one network.

    Args:
        depth: transformer blocks.
        heads: attention heads; the width is heads * head_channels.
        head_channels: channels a head, an even number.
        channels: latent channels, in and out.
        patch: side of a patch, in latent pixels; a patch spans one latent frame.
        hidden: channels of the feed-forward.
        text_channels: channels of a text state.
        time_channels: channels of the sinusoidal time embedding.
        cross_norm: a layer norm before the cross-attention.
        eps: of every norm.
        max_positions: most latent frames, and most patches on a side, that have a position.
    """

    depth: int
    heads: int
    head_channels: int
    hidden: int
    channels: int = 16
    patch: int = 2
    text_channels: int = 4096
    time_channels: int = 256
    cross_norm: bool = True
    eps: float = 1e-6
    max_positions: int = 1024

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_channels


class Attention(Projections):
    """Multi-head attention of tokens x_BLD to a context_BSD (or to themselves), with RMS norms over the whole width of
    q and k, the kernel handed in.
    """

    def __init__(self, config: WanConfig, kernel: AttentionKernel) -> None:
        width = config.width
        super().__init__(width)
        self.head_channels = config.head_channels
        self.kernel = kernel
        self.to_out = nn.Linear(width, width)
        self.norm_q = nn.RMSNorm(width, eps=config.eps)
        self.norm_k = nn.RMSNorm(width, eps=config.eps)

    def forward(self, x_BLD: Tensor, context_BSD: Tensor | None = None, rope_2LE: Tensor | None = None) -> Tensor:
        if context_BSD is None:
            q, k, v = self.qkv(x_BLD)
        else:
            q, k, v = self.to_q(x_BLD), self.to_k(context_BSD), self.to_v(context_BSD)
        heads = (y.unflatten(-1, (-1, self.head_channels)) for y in (self.norm_q(q), self.norm_k(k), v))
        q_BLAE, k_BSAE, v_BSAE = heads
        if rope_2LE is not None:
            q_BLAE, k_BSAE = rotate(q_BLAE, rope_2LE), rotate(k_BSAE, rope_2LE)
        return self.to_out(self.kernel(q_BLAE, k_BSAE, v_BSAE).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; shift, scale and gate from one shared modulation."""

    def __init__(self, config: WanConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        width = config.width
        self.eps = config.eps
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)
        self.self_attention = Attention(config, kernel)
        self.cross_attention = Attention(config, kernel)
        self.cross_norm = nn.LayerNorm(width, eps=config.eps) if config.cross_norm else nn.Identity()
        self.feed_forward = FeedForward(width, config.hidden)

    def forward(self, x_BLD: Tensor, text_BSD: Tensor, modulation_B6D: Tensor, rope_2LE: Tensor) -> Tensor:
        table = self.scale_shift_table + modulation_B6D.float()
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.unsqueeze(2).unbind(1)
        x = x_BLD
        seen = modulate(_norm(x, self.eps), shift_a, scale_a).type_as(x)
        x = (x.float() + self.self_attention(seen, rope_2LE=rope_2LE) * gate_a).type_as(x)
        x = x + self.cross_attention(self.cross_norm(x.float()).type_as(x), text_BSD)
        seen = modulate(_norm(x, self.eps), shift_f, scale_f).type_as(x)
        return (x.float() + self.feed_forward(seen).float() * gate_f).type_as(x)


class Wan(nn.Module):
    """A text-to-video diffusion transformer: (latent, tau, text) to the network's raw output, a latent.

    Args:
        config: the sizes.
        kernel: the attention of every block (models.attention).

    Source: Wan 2.1 (arXiv:2503.20314); the weights' meaning is that of diffusers' `WanTransformer3DModel`.
    """

    def __init__(self, config: WanConfig, kernel: AttentionKernel = sdpa_attention) -> None:
        super().__init__()
        width, sides = config.width, (1, config.patch, config.patch)
        self.config = config
        self.patch_embed = nn.Conv3d(config.channels, width, kernel_size=sides, stride=sides)
        self.time_in = nn.Linear(config.time_channels, width)
        self.time_out = nn.Linear(width, width)
        self.time_modulation = nn.Linear(width, 6 * width)
        self.text_in = nn.Linear(config.text_channels, width)
        self.text_out = nn.Linear(width, width)
        self.blocks = nn.ModuleList([Block(config, kernel) for _ in range(config.depth)])
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.project_out = nn.Linear(width, config.patch**2 * config.channels)

    def forward(self, latent_BCFHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """One evaluation (models.components.Denoiser); it reads the text states, whose padding is zeros.

        Raises:
            ValueError: no text states, a mask over them, or a video longer or larger than there are positions.
        """
        if condition.mask is not None:
            raise ValueError("Wan reads text padded with zeros, not a mask")
        config = self.config
        text_BSD, _ = text_of(self, condition)
        frames, height, width = latent_BCFHW.shape[2], *(side // config.patch for side in latent_BCFHW.shape[-2:])
        if max(frames, height, width) > config.max_positions:
            raise ValueError(f"{frames} x {height} x {width} tokens; positions end at {config.max_positions} a side")
        rope_2LE = rope_3d(frames, height, width, config.head_channels, latent_BCFHW.device)
        x_BLD = self.patch_embed(latent_BCFHW).flatten(2).transpose(1, 2).contiguous()
        told_B7D = told_of(self, latent_BCFHW, tau_B, condition)
        modulation_B6D, time_B1D = told_B7D.split([6, 1], dim=1)
        for block in self.blocks:
            x_BLD = block(x_BLD, text_BSD, modulation_B6D, rope_2LE)
        shift, scale = (self.scale_shift_table + time_B1D).unsqueeze(2).unbind(1)
        y_BLP = self.project_out(modulate(_norm(x_BLD, config.eps), shift, scale).type_as(x_BLD))
        return self._unpatch(y_BLP, frames, height, width)

    def tell(self, latent_BCFHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """The modulation that all blocks share, and the time (models.components.AheadNetwork)."""
        sines_BE = timestep_embedding(tau_B, self.config.time_channels).to(self.time_in.weight.dtype)
        time_BD = self.time_out(F.silu(self.time_in(sines_BE))).type_as(latent_BCFHW)
        modulation_B6D = self.time_modulation(F.silu(time_BD)).unflatten(-1, (6, -1))
        return torch.cat([modulation_B6D, time_BD[:, None]], dim=1)

    def read(self, condition: Conditioning) -> Conditioning:
        """The text in the network's width (models.components.AheadNetwork)."""
        text_BSD = self.text_out(F.gelu(self.text_in(condition.text()), approximate="tanh"))
        return replace(condition, states=None, context=text_BSD)

    def _unpatch(self, y_BLP: Tensor, frames: int, height: int, width: int) -> Tensor:
        """(B, L, p p C) to (B, C, F, H, W): a token's outputs are ordered row, column, channel."""
        patch, channels = self.config.patch, self.config.channels
        y = y_BLP.unflatten(1, (frames, height, width)).unflatten(-1, (patch, patch, channels))
        return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(-1, channels, frames, height * patch, width * patch)


@kept
def rope_3d(frames: int, height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Cosines and sines of every token's rotary angles: (2, L, channels / 2) float32.

    The last third of a head's channels turns with the column, the third before it with the row, each of
    2 (channels // 6); what is left, in front, turns with the frame.

    Source: RoFormer (Su et al. 2021) in three axes, as in Wan 2.1; angles in float64.
    """
    side = 2 * (channels // 6)
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (frames, height, width)), indexing="ij")
    angles = [
        torch.outer(place.flatten(), THETA ** -(torch.arange(0, part, 2, dtype=torch.float64) / part))
        for place, part in zip(grid, (channels - 2 * side, side, side), strict=True)
    ]
    angles_LE = torch.cat(angles, dim=-1)
    return torch.stack([angles_LE.cos(), angles_LE.sin()]).float().to(device)


def _norm(x_BLD: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x_BLD.float(), x_BLD.shape[-1:], eps=eps)
