"""Small layers that several networks share: embeddings of time and place, modulation, attention, feed-forward.

Shapes: B batch, L tokens, S tokens attended to, C channels (the network's width), H heads, E channels a head or of an
embedding, F angles a head, P outputs a patch; J text and picture joined, and D for C in a block, whose arguments
plans name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import AttentionKernel

P = ParamSpec("P")


def timestep_embedding(
    tau_B: Tensor, width: int, max_period: float = 10_000.0, freq_shift: int = 0, scale: float = 1.0
) -> Tensor:
    """Sinusoidal embedding of the number the network is told, cosines first.

    The slowest of the width / 2 rates is 1 / max_period for freq_shift 1, and one rate short of it for 0. The angles
    are multiplied by scale last, which in float32 is not the same as multiplying tau.

    Source: DDPM (Ho et al. 2020), in the order of diffusers' `Timesteps(flip_sin_to_cos=True,
    downscale_freq_shift=freq_shift)`. Shapes: tau (B,) float32 to (B, width) float32; `width` is even.
    """
    half = width // 2
    count = torch.arange(half, dtype=torch.float32, device=tau_B.device)
    rates = torch.exp(-math.log(max_period) * count / (half - freq_shift))
    angles = scale * (tau_B.float()[:, None] * rates)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


_holders: list[list[Tensor]] = []


def kept(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Remembers the last results of a pure function of sizes (a table of positions), for it is asked at every step.

    They are made outside inference mode, so that training may use what sampling has asked for first.
    """
    remembered: Callable[P, Tensor] = lru_cache(maxsize=16)(torch.inference_mode(False)(make))  # type: ignore[assignment]

    @wraps(make)
    def ask(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        found = remembered(*args, **kwargs)
        for holder in _holders:
            holder.append(found)
        return found

    return ask


@contextmanager
def holding() -> Iterator[list[Tensor]]:
    """Collects what `kept` functions hand out meanwhile, for who reads it longer than they remember it."""
    holder: list[Tensor] = []
    _holders.append(holder)
    try:
        yield holder
    finally:
        _holders.remove(holder)


def sincos_table_2d(height: int, width: int, channels: int, base: int, scale: float = 1.0) -> Tensor:
    """Fixed 2-D sine-cosine positions: the first half of the channels for the column, the second for the row.

    Source: ViT / MAE, as in PixArt (Chen et al. 2023) and diffusers' `PatchEmbed`: positions are measured in units of
    the training grid (`base` tokens a side), so another size interpolates. Shapes: (height * width, channels) float32;
    `channels` is divisible by 4.
    """
    rows = torch.arange(height, dtype=torch.float32) / (height / base) / scale
    columns = torch.arange(width, dtype=torch.float32) / (width / base) / scale
    quarter = channels // 4
    rates = 1.0 / 10_000.0 ** (torch.arange(quarter, dtype=torch.float64) / quarter)

    def encode(positions: Tensor) -> Tensor:
        angles = torch.outer(positions.double(), rates)
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()

    of_column = encode(columns)[None, :, :].expand(height, width, -1)
    of_row = encode(rows)[:, None, :].expand(height, width, -1)
    return torch.cat([of_column, of_row], dim=-1).reshape(height * width, channels)


@kept
def sincos_positions_2d(
    height: int, width: int, channels: int, base: int, scale: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The same table where it is added, remembered."""
    return sincos_table_2d(height, width, channels, base, scale).to(device, dtype)


def rotary_angles(places_L: Tensor, channels: int, theta: float) -> Tensor:
    """Angles of tokens on one axis: place times theta^(-2 k / channels) for k = 0, 1 ..., (L, channels / 2) float32.

    They are computed in the dtype of the places, which decides their last bits.
    """
    rates = 1.0 / theta ** (torch.arange(0, channels, 2, device=places_L.device).to(places_L.dtype) / channels)
    return torch.outer(places_L, rates).float()


def rotate(x_BLHE: Tensor, rope_2LF: Tensor) -> Tensor:
    """Turns each pair of neighbouring channels by its token's angle, in float32.

    Args:
        x_BLHE: queries or keys.
        rope_2LF: cosines and sines of the angles, F = E / 2 a token; (2, B, L, F) where the rows of a batch differ.

    Source: RoFormer (Su et al. 2021, arXiv:2104.09864).
    """
    cos_L1F, sin_L1F = rope_2LF.unsqueeze(-2)
    even, odd = x_BLHE.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos_L1F - odd * sin_L1F, even * sin_L1F + odd * cos_L1F], dim=-1)
    return turned.flatten(-2).type_as(x_BLHE)


def modulate(x_BLC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor) -> Tensor:
    """Adaptive layer norm's affine part, x (1 + scale) + shift (PixArt, Peebles and Xie 2022, section 3.2)."""
    return x_BLC * (1 + scale_B1C) + shift_B1C


def plain_norm(x_BLC: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm without weights of its own: what `modulate` follows."""
    return F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=eps)


def unpatchify(y_BLP: Tensor, height: int, width: int, patch: int) -> Tensor:
    """(B, L, p p C) to (B, C, p height, p width): a token's outputs are ordered row, column, channel."""
    y = y_BLP.unflatten(1, (height, width)).unflatten(-1, (patch, patch, -1))
    return y.permute(0, 5, 1, 3, 2, 4).reshape(len(y), -1, height * patch, width * patch)


class Modulation(nn.Linear):
    """What a block is told of the time, (B, C), to shifts, scales and gates, (B, 1, M): one linear, of its SiLU."""

    def __init__(self, width: int, out: int, silu: bool = True) -> None:
        super().__init__(width, out)
        self.silu = silu

    def forward(self, told_BC: Tensor) -> Tensor:
        return super().forward(F.silu(told_BC) if self.silu else told_BC)[:, None]


class Embedder(nn.Module):
    """One vector a sample to the network's width: linear, SiLU, linear."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x_BE: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x_BE)))


class Projections(nn.Module):
    """The linears to queries, keys and values; one that joins them can be put in their place (`to_qkv`)."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias)
        self.to_k = nn.Linear(width, width, bias)
        self.to_v = nn.Linear(width, width, bias)
        self.to_qkv: nn.Module | None = None

    def qkv(self, x_BLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the same tokens, (B, L, H E) each."""
        if self.to_qkv is None:
            return self.to_q(x_BLC), self.to_k(x_BLC), self.to_v(x_BLC)
        q, k, v = self.to_qkv(x_BLC).chunk(3, dim=-1)
        return q, k, v


class Heads(Projections):
    """Queries, keys and values of one stream of tokens.

    Args:
        width: channels of a token.
        head_channels: channels a head.
        norm: RMS norms of queries and keys, head by head.
    """

    def __init__(self, width: int, head_channels: int, norm: bool = True) -> None:
        super().__init__(width)
        self.head_channels = head_channels
        self.norm_q = nn.RMSNorm(head_channels, eps=1e-6) if norm else nn.Identity()
        self.norm_k = nn.RMSNorm(head_channels, eps=1e-6) if norm else nn.Identity()

    def forward(self, x_BLC: Tensor, rope_2LF: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, (B, L, H, E) each; q and k turned by rope_2LF where there are rotary positions."""
        q, k, v = (y.unflatten(-1, (-1, self.head_channels)) for y in self.qkv(x_BLC))
        q, k = self.norm_q(q), self.norm_k(k)
        if rope_2LF is not None:
            q, k = rotate(q, rope_2LF), rotate(k, rope_2LF)
        return q, k, v


class Attention(Projections):
    """Multi-head attention of tokens x_BLC to a context_BSC (or to themselves), the kernel handed in."""

    def __init__(self, width: int, heads: int, kernel: AttentionKernel) -> None:
        super().__init__(width)
        self.head_channels = width // heads
        self.kernel = kernel
        self.to_out = nn.Linear(width, width)

    def forward(self, x_BLC: Tensor, context_BSC: Tensor | None = None, mask_BS: Tensor | None = None) -> Tensor:
        if context_BSC is None:
            qkv = self.qkv(x_BLC)
        else:
            qkv = self.to_q(x_BLC), self.to_k(context_BSC), self.to_v(context_BSC)
        q_BLHE, k_BSHE, v_BSHE = (y.unflatten(-1, (-1, self.head_channels)) for y in qkv)
        return self.to_out(self.kernel(q_BLHE, k_BSHE, v_BSHE, mask_BS).flatten(2))


class FeedForward(nn.Module):
    """Two linears, GELU (tanh form) in between; four times as wide there where `hidden` says nothing."""

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden or 4 * width)
        self.activation = nn.GELU("tanh")
        self.down = nn.Linear(hidden or 4 * width, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_BLC)))


class JointBlock(nn.Module):
    """Two streams of tokens with weights of their own, joined in one attention, text first; each then has its
    feed-forward. Text without text_rope_2SF is not turned; mask_BS hides text.

    Source: the double blocks of FLUX.1 and of Qwen-Image (arXiv:2508.02324).
    """

    def __init__(self, width: int, head_channels: int, kernel: AttentionKernel) -> None:
        super().__init__()
        self.kernel = kernel
        self.modulation = Modulation(width, 6 * width)
        self.text_modulation = Modulation(width, 6 * width)
        self.heads = Heads(width, head_channels)
        self.text_heads = Heads(width, head_channels)
        self.to_out = nn.Linear(width, width)
        self.text_to_out = nn.Linear(width, width)
        self.feed_forward = FeedForward(width)
        self.text_feed_forward = FeedForward(width)

    def forward(
        self,
        x_BLD: Tensor,
        text_BSD: Tensor,
        time_BD: Tensor,
        rope_2LF: Tensor,
        text_rope_2SF: Tensor | None = None,
        mask_BS: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        x, text = x_BLD, text_BSD
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(time_BD).chunk(6, dim=-1)
        of_x = self.heads(modulate(plain_norm(x), shift_a, scale_a), rope_2LF)
        t_shift_a, t_scale_a, t_gate_a, t_shift_f, t_scale_f, t_gate_f = self.text_modulation(time_BD).chunk(6, dim=-1)
        of_text = self.text_heads(modulate(plain_norm(text), t_shift_a, t_scale_a), text_rope_2SF)
        q, k, v = (torch.cat(both, dim=1) for both in zip(of_text, of_x, strict=True))
        mask_BJ = None if mask_BS is None else F.pad(mask_BS, (0, x.shape[1]), value=True)
        text_seen, seen = self.kernel(q, k, v, mask_BJ).flatten(2).split([text.shape[1], x.shape[1]], dim=1)
        x = x + gate_a * self.to_out(seen)
        x = x + gate_f * self.feed_forward(modulate(plain_norm(x), shift_f, scale_f))
        text = text + t_gate_a * self.text_to_out(text_seen)
        text = text + t_gate_f * self.text_feed_forward(modulate(plain_norm(text), t_shift_f, t_scale_f))
        return x, text
