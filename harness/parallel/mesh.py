"""The position of each rank on the mesh: world size = dp x cfg x tp x ring x ulysses, ulysses innermost.

A layout has a ring or a pipeline: the ranks of a pipeline use the ring's axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from harness.config.schema import ParallelConfig

AXES = ("dp", "cfg", "tp", "ring", "ulysses")
T = TypeVar("T")


@dataclass(frozen=True)
class RankPosition:
    """The coordinates of one rank on the mesh.

    Args:
        rank: the rank in the world.
        degrees: the size of each axis of AXES.
    """

    rank: int
    degrees: tuple[int, ...]

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return world_size(self.degrees)

    @property
    def replica_size(self) -> int:
        """The number of ranks that compute one image together."""
        return self.world_size // self.degrees[0]

    @property
    def replica(self) -> int:
        """The index of the data-parallel replica that this rank belongs to."""
        return self.rank // self.replica_size

    def replica_items(self, items: Sequence[T]) -> list[T]:
        """Return every dp-th item, those of this replica: an item is the same work at any degree."""
        return list(items[self.replica :: self.degrees[0]])


def degrees(parallel: ParallelConfig) -> tuple[int, ...]:
    """Return the sizes of the axes, in the order of AXES."""
    return (parallel.dp, parallel.cfg, parallel.tp, parallel.ring * parallel.pipe, parallel.ulysses)


def world_size(sizes: Sequence[int]) -> int:
    """Return the product of the degrees."""
    return math.prod(sizes)


TEMPORAL_HALO = 2
"""Latent frames that a rank needs when a video is decoded by frames: as many as a convolution over time looks back."""
