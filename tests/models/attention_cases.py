"""Queries, keys, values and masks for tests of attention, the exact answer, and how far rounding may move it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention.reference import math_lse


@dataclass(frozen=True)
class Exact:
    """The answer in float64, and what the bounds need: the largest score, that of |q| |k|, and sum_s w_s |v_s|."""

    out_BLHD: Tensor
    lse_BLH: Tensor
    largest: float
    norms: float
    spread_BLHD: Tensor
    keys: int

    def out_bound(self, dtype: torch.dtype, score_dtype: torch.dtype) -> Tensor:
        """Scores off by delta move weights by a factor within exp(+-2 delta); then weights, sum and output round.

        The sum over n terms is taken to lose sqrt(n) roundings of float32, not n: errors of both signs.
        """
        wide = unit(torch.promote_types(dtype, torch.float32))
        rest = 2 * unit(dtype) + (self.keys**0.5 + 4) * wide
        factor = torch.expm1(torch.tensor(2 * self.delta(dtype, score_dtype))) + rest
        return factor * self.spread_BLHD + unit(dtype) * 1e-6

    def lse_bound(self, dtype: torch.dtype, score_dtype: torch.dtype) -> Tensor:
        """The same scores under a logarithm, which is float32 or better.

        With 16-bit tensors PyTorch's CPU kernel takes exponentials that are good to 2^-14, which merges never notice.
        """
        wide = unit(torch.promote_types(dtype, torch.float32))
        exponential = 2.0**-14 if dtype is torch.bfloat16 else 0.0
        return self.delta(dtype, score_dtype) + exponential + (self.keys**0.5 + 4 * self.lse_BLH.abs()) * wide

    def delta(self, dtype: torch.dtype, score_dtype: torch.dtype) -> float:
        """What a score loses: its sum in float32, then twice a rounding (product, scale) to the dtype it is kept in."""
        wide = unit(torch.promote_types(dtype, torch.float32))
        return self.norms * 8 * wide + self.largest * 2 * unit(score_dtype)


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Exact:
    """The reference on the same numbers in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out, lse = math_lse(q, k, v, mask)
    spread, _ = math_lse(q, k, v.abs(), mask)
    scale = q.shape[-1] ** -0.5
    largest = torch.einsum("blhd,bshd->blhs", q, k).abs().max().item() * scale
    norms = (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item() * scale
    return Exact(out, lse, largest, norms, spread, k.shape[1])


def tensors(
    queries: int, keys: int, width: int, dtype: torch.dtype, scale: float = 1.0, batch: int = 3, heads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v from a seed of their sizes; `scale` is that of the scores."""
    generator = torch.Generator().manual_seed(queries * 100_000 + keys * 100 + width)
    sizes = (queries, keys, keys)
    q, k, v = (torch.randn(batch, n, heads, width, generator=generator, dtype=torch.float64) for n in sizes)
    return (scale * q).to(dtype), k.to(dtype), v.to(dtype)


def mask_of(kind: str, batch: int, keys: int) -> Tensor | None:
    """none; random; tail: a valid length a row; empty: the first sample has no key at all."""
    if kind == "none":
        return None
    lengths = torch.linspace(1, keys, batch).long()
    if kind == "tail":
        return torch.arange(keys) < lengths[:, None]
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(keys)) < 0.6
    mask[:, keys // 2] = True
    if kind == "empty":
        mask[0] = False
    return mask


def assert_within(found: Tensor, wanted: Tensor, bound: Tensor) -> None:
    """Element by element; the same infinities count as equal."""
    assert found.shape == wanted.shape
    error = torch.where(found.double() == wanted, 0.0, (found.double() - wanted).abs())
    worst = (error / bound).max()
    assert worst <= 1, f"{worst:.3g} times the bound"
