"""Small layers that several networks share: sinusoidal embeddings of time and place, adaptive modulation.

Shapes: B batch, L tokens, C channels (the network's width), E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def timestep_embedding(tau_B: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of the number the network is told, cosines first.

    Source: DDPM (Ho et al. 2020), in the order of diffusers' `Timesteps(flip_sin_to_cos=True, downscale_freq_shift=0)`.
    Shapes: tau (B,) float32 to (B, width) float32; `width` is even.
    """
    half = width // 2
    rates = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=tau_B.device) / half)
    angles = tau_B.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def kept(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Remembers the last results of a pure function of sizes (a table of positions), for it is asked at every step.

    They are made outside inference mode, so that training may use what sampling has asked for first.
    """
    remembered: Callable[P, Tensor] = lru_cache(maxsize=16)(torch.inference_mode(False)(make))  # type: ignore[assignment]

    @wraps(make)
    def ask(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return remembered(*args, **kwargs)

    return ask


@kept
def sincos_positions_2d(height: int, width: int, channels: int, base: int, scale: float = 1.0) -> Tensor:
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
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    of_column = encode(columns)[None, :, :].expand(height, width, -1)
    of_row = encode(rows)[:, None, :].expand(height, width, -1)
    return torch.cat([of_column, of_row], dim=-1).reshape(height * width, channels).float()


def modulate(x_BLC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor) -> Tensor:
    """Adaptive layer norm's affine part, x (1 + scale) + shift (PixArt, Peebles and Xie 2022, section 3.2)."""
    return x_BLC * (1 + scale_B1C) + shift_B1C
