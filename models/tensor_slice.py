"""The slice of a tensor that a sharded parameter holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from models.plan import ParallelPlan


@dataclass(frozen=True)
class TensorSlice:
    """Ranges of indices of one dimension of a tensor.

    Args:
        dim: The sliced dimension.
        size: The size of the full tensor in that dimension.
        ranges: Pairs (start, end) of indices, end excluded, in the order in which they are joined.
    """

    dim: int
    size: int
    ranges: tuple[tuple[int, int], ...]

    def full_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the full tensor, from the shape of the slice."""
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])

    def of(self, x: Tensor) -> Tensor:
        """Return a copy of this slice of a full tensor."""
        pieces = [x.narrow(self.dim, start, end - start) for start, end in self.ranges]
        return torch.cat(pieces, dim=self.dim).contiguous()

    def element_ranges(self, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield the ranges (start, end) of the slice's elements in a full tensor of this shape, in row-major order."""
        inner = math.prod(shape[self.dim + 1 :])
        for row in range(math.prod(shape[: self.dim])):
            base = row * self.size * inner
            yield from ((base + start * inner, base + end * inner) for start, end in self.ranges)


ShardWeights: TypeAlias = Callable[[nn.Module, ParallelPlan], Mapping[str, TensorSlice]]
"""Shard a network in place, by its plan; return the slice of each full parameter that is left, by name."""
