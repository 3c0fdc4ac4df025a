"""Which rank is where: world size = dp x cfg x tp x ring x ulysses, ulysses innermost.

A layout has a ring or a pipeline: the ranks of a pipeline stand on the ring's axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from harness.config.schema import ParallelConfig

AXES = ("dp", "cfg", "tp", "ring", "ulysses")
T = TypeVar("T")


@dataclass(frozen=True)
class RankPosition:
    """One rank's coordinates on the mesh.

    Args:
        rank: in the world.
        degrees: size of each axis of AXES.
    """

    rank: int
    degrees: tuple[int, ...]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return world_size(self.degrees)

    @property
    def replica_size(self) -> int:
        """Ranks that compute one picture together."""
        return self.world_size // self.degrees[0]

    @property
    def replica(self) -> int:
        """Which data-parallel replica this rank belongs to."""
        return self.rank // self.replica_size

    def replica_items(self, items: Sequence[T]) -> list[T]:
        """This replica's part of a list: every dp-th item, so that an item is the same work at any degree."""
        return list(items[self.replica :: self.degrees[0]])


def degrees(parallel: ParallelConfig) -> tuple[int, ...]:
    """The sizes of the axes, in the order of AXES."""
    return (parallel.dp, parallel.cfg, parallel.tp, parallel.ring * parallel.pipe, parallel.ulysses)


def world_size(sizes: Sequence[int]) -> int:
    """The product of the degrees."""
    product = 1
    for size in sizes:
        product *= size
    return product


TEMPORAL_HALO = 2
"""Latent frames that a rank needs where a video is decoded by frames: as many as a convolution over time looks back."""
