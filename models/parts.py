"""A part of a tensor: what a network holds of a weight where it is not to hold the whole of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from models.plan import ParallelPlan


@dataclass(frozen=True)
class Part:
    """Some of the indices of one dimension of a tensor.

    Args:
        dim: which dimension.
        size: of the whole tensor there.
        runs: (first, behind the last) of each run of indices, in the order in which they are joined.
    """

    dim: int
    size: int
    runs: tuple[tuple[int, int], ...]

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole tensor, from that of the part."""
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])

    def of(self, x: Tensor) -> Tensor:
        """A copy of the part, from the whole tensor."""
        pieces = [x.narrow(self.dim, first, behind - first) for first, behind in self.runs]
        return torch.cat(pieces, dim=self.dim).contiguous()

    def spans(self, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Where the part's numbers lie among those of a whole tensor of this shape, both in row-major order."""
        inner = math.prod(shape[self.dim + 1 :])
        for row in range(math.prod(shape[: self.dim])):
            base = row * self.size * inner
            yield from ((base + first * inner, base + behind * inner) for first, behind in self.runs)


Cut: TypeAlias = Callable[[nn.Module, ParallelPlan], Mapping[str, Part]]
"""Makes a network smaller in place, by its plan; by name, which parts of the whole parameters it is left with."""
