"""Small layers that several networks share: time embedding, positions, modulation, attention, feed-forward.

Shapes: B batch, L tokens, S tokens attended to, C channels (the network's width), H heads, E channels of a head or of
an embedding, F angles per head, P outputs per patch; J text and image tokens joined. In a block, whose argument names
the plans contain, D stands for C.
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
    """Return the sinusoidal embedding of the network's time input, cosines first.

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


_collectors: list[list[Tensor]] = []


def cached_tensor(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Cache the last results of a pure function of sizes, such as a table of positions that every step needs.

    The results are computed outside inference mode, so that training can use a table that sampling computed first.

    Args:
        make: The function; its arguments are hashable.

    Returns:
        The function with a cache of 16 results.
    """
    cached: Callable[P, Tensor] = lru_cache(maxsize=16)(torch.inference_mode(False)(make))  # type: ignore[assignment]

    @wraps(make)
    def look_up(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        result = cached(*args, **kwargs)
        for collector in _collectors:
            collector.append(result)
        return result

    return look_up


@contextmanager
def collect_cached_tensors() -> Iterator[list[Tensor]]:
    """Collect what `cached_tensor` functions return inside the context, for a caller that outlives their cache.

    Yields:
        The list of tensors; it grows while the context is open.
    """
    collector: list[Tensor] = []
    _collectors.append(collector)
    try:
        yield collector
    finally:
        _collectors.remove(collector)


def sincos_table_2d(height: int, width: int, channels: int, base: int, scale: float = 1.0) -> Tensor:
    """Return fixed 2-D sine-cosine positions: the first half of the channels for the column, the second for the row.

    Source: ViT / MAE, as in PixArt (Chen et al. 2023) and diffusers' `PatchEmbed`: positions are in units of the
    training grid (`base` tokens per side), so another size interpolates. Shapes: (height * width, channels) float32;
    `channels` is divisible by 4.
    """
    rows = torch.arange(height, dtype=torch.float32) / (height / base) / scale
    columns = torch.arange(width, dtype=torch.float32) / (width / base) / scale
    quarter = channels // 4
    rates = 1.0 / 10_000.0 ** (torch.arange(quarter, dtype=torch.float64) / quarter)

    def encode(positions: Tensor) -> Tensor:
        angles = torch.outer(positions.double(), rates)
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()

    column_part = encode(columns)[None, :, :].expand(height, width, -1)
    row_part = encode(rows)[:, None, :].expand(height, width, -1)
    return torch.cat([column_part, row_part], dim=-1).reshape(height * width, channels)


@cached_tensor
def sincos_positions_2d(
    height: int, width: int, channels: int, base: int, scale: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the table of `sincos_table_2d` in the dtype and on the device of the tokens, cached."""
    return sincos_table_2d(height, width, channels, base, scale).to(device, dtype)


def rotary_angles(positions_L: Tensor, channels: int, theta: float) -> Tensor:
    """Return the angles of tokens on one axis, (L, channels / 2) float32.

    The angle is position * theta^(-2 k / channels) for k = 0, 1 ... It is computed in the dtype of the positions, which
    decides the last bits.
    """
    rates = 1.0 / theta ** (torch.arange(0, channels, 2, device=positions_L.device).to(positions_L.dtype) / channels)
    return torch.outer(positions_L, rates).float()


def rotate(x_BLHE: Tensor, rope_2LF: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels by its token's angle, in float32.

    Source: RoFormer (Su et al. 2021, arXiv:2104.09864).

    Args:
        x_BLHE: Queries or keys.
        rope_2LF: Cosines and sines of the angles, F = E / 2 per token; (2, B, L, F) if the rows of a batch differ.

    Returns:
        The rotated tensor, in the dtype of x_BLHE.
    """
    cos_L1F, sin_L1F = rope_2LF.unsqueeze(-2)
    even, odd = x_BLHE.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos_L1F - odd * sin_L1F, even * sin_L1F + odd * cos_L1F], dim=-1)
    return rotated.flatten(-2).type_as(x_BLHE)


def modulate(x_BLC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor) -> Tensor:
    """Return the affine part of adaptive layer norm, x (1 + scale) + shift (DiT, Peebles and Xie 2022, section 3.2)."""
    return x_BLC * (1 + scale_B1C) + shift_B1C


def plain_norm(x_BLC: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the layer norm without weights of its own, which `modulate` follows."""
    return F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=eps)


def unpatchify(y_BLP: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Return (B, C, p height, p width) from (B, L, p p C): a token's outputs are ordered row, column, channel."""
    y = y_BLP.unflatten(1, (height, width)).unflatten(-1, (patch, patch, -1))
    return y.permute(0, 5, 1, 3, 2, 4).reshape(len(y), -1, height * patch, width * patch)


class Modulation(nn.Linear):
    """The time embedding (B, C) to shifts, scales and gates, (B, 1, M): a SiLU and one linear."""

    def __init__(self, width: int, out: int, silu: bool = True) -> None:
        super().__init__(width, out)
        self.silu = silu

    def forward(self, temb_BC: Tensor) -> Tensor:
        """Return shifts, scales and gates, (B, 1, M)."""
        return super().forward(F.silu(temb_BC) if self.silu else temb_BC)[:, None]


class MLPEmbedder(nn.Module):
    """One vector per sample to the network's width: linear, SiLU, linear."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x_BE: Tensor) -> Tensor:
        """Return the embedding, (B, C)."""
        return self.linear_2(F.silu(self.linear_1(x_BE)))


class QKVProjection(nn.Module):
    """The linears to queries, keys and values; one fused linear can replace them (`to_qkv`).

    Attributes:
        head_channels: The number of channels per head.
    """

    head_channels: int

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias)
        self.to_k = nn.Linear(width, width, bias)
        self.to_v = nn.Linear(width, width, bias)
        self.to_qkv: nn.Module | None = None

    def qkv(self, x_BLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of the same tokens, (B, L, H E) each."""
        if self.to_qkv is None:
            return self.to_q(x_BLC), self.to_k(x_BLC), self.to_v(x_BLC)
        q, k, v = self.to_qkv(x_BLC).chunk(3, dim=-1)
        return q, k, v


class QKVHeads(QKVProjection):
    """Queries, keys and values of one stream of tokens, split into heads.

    Args:
        width: The number of channels of a token.
        head_channels: The number of channels per head.
        norm: Whether queries and keys have RMS norms, per head.
    """

    def __init__(self, width: int, head_channels: int, norm: bool = True) -> None:
        super().__init__(width)
        self.head_channels = head_channels
        self.norm_q = nn.RMSNorm(head_channels, eps=1e-6) if norm else nn.Identity()
        self.norm_k = nn.RMSNorm(head_channels, eps=1e-6) if norm else nn.Identity()

    def forward(self, x_BLC: Tensor, rope_2LF: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, (B, L, H, E) each, with q and k rotated by rope_2LF if it is given."""
        q, k, v = (y.unflatten(-1, (-1, self.head_channels)) for y in self.qkv(x_BLC))
        q, k = self.norm_q(q), self.norm_k(k)
        if rope_2LF is not None:
            q, k = rotate(q, rope_2LF), rotate(k, rope_2LF)
        return q, k, v


class Attention(QKVProjection):
    """Multi-head attention of tokens x_BLC to a context_BSC, or to themselves, with the given kernel."""

    def __init__(self, width: int, heads: int, kernel: AttentionKernel) -> None:
        super().__init__(width)
        self.head_channels = width // heads
        self.kernel = kernel
        self.to_out = nn.Linear(width, width)

    def forward(self, x_BLC: Tensor, context_BSC: Tensor | None = None, mask_BS: Tensor | None = None) -> Tensor:
        """Return the attention output of x_BLC, (B, L, C)."""
        if context_BSC is None:
            qkv = self.qkv(x_BLC)
        else:
            qkv = self.to_q(x_BLC), self.to_k(context_BSC), self.to_v(context_BSC)
        q_BLHE, k_BSHE, v_BSHE = (y.unflatten(-1, (-1, self.head_channels)) for y in qkv)
        return self.to_out(self.kernel(q_BLHE, k_BSHE, v_BSHE, mask_BS).flatten(2))


class FeedForward(nn.Module):
    """Two linears with a GELU (tanh form) between them; the hidden width is four times the width by default."""

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden or 4 * width)
        self.activation = nn.GELU("tanh")
        self.down = nn.Linear(hidden or 4 * width, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Return the output of the feed-forward, (B, L, C)."""
        return self.down(self.activation(self.up(x_BLC)))


class JointBlock(nn.Module):
    """Two streams of tokens with their own weights, joined in one attention, text first, then one feed-forward each.

    Text is not rotated without text_rope_2SF; mask_BS masks text tokens.

    Source: the double blocks of FLUX.1 and of Qwen-Image (arXiv:2508.02324).
    """

    def __init__(self, width: int, head_channels: int, kernel: AttentionKernel) -> None:
        super().__init__()
        self.kernel = kernel
        self.modulation = Modulation(width, 6 * width)
        self.text_modulation = Modulation(width, 6 * width)
        self.heads = QKVHeads(width, head_channels)
        self.text_heads = QKVHeads(width, head_channels)
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
        """Return image tokens and text tokens after the block."""
        x, text = x_BLD, text_BSD
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(time_BD).chunk(6, dim=-1)
        image_qkv = self.heads(modulate(plain_norm(x), shift_a, scale_a), rope_2LF)
        t_shift_a, t_scale_a, t_gate_a, t_shift_f, t_scale_f, t_gate_f = self.text_modulation(time_BD).chunk(6, dim=-1)
        text_qkv = self.text_heads(modulate(plain_norm(text), t_shift_a, t_scale_a), text_rope_2SF)
        q, k, v = (torch.cat(streams, dim=1) for streams in zip(text_qkv, image_qkv, strict=True))
        mask_BJ = None if mask_BS is None else F.pad(mask_BS, (0, x.shape[1]), value=True)
        text_attended, attended = self.kernel(q, k, v, mask_BJ).flatten(2).split([text.shape[1], x.shape[1]], dim=1)
        x = x + gate_a * self.to_out(attended)
        x = x + gate_f * self.feed_forward(modulate(plain_norm(x), shift_f, scale_f))
        text = text + t_gate_a * self.text_to_out(text_attended)
        text = text + t_gate_f * self.text_feed_forward(modulate(plain_norm(text), t_shift_f, t_scale_f))
        return x, text
