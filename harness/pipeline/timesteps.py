"""Timestep preparation: the grid of the solver."""

from __future__ import annotations

from harness.pipeline.state import RunContext, Sample
from schedulers.grid import Grid
from schedulers.noise_scheduler import NoiseScheduler


class TimestepPreparation:
    """Stage 3.

    Args:
        noise_scheduler: makes the grid.
        size_multiple: pixels on a side of one token of the network.
    """

    name = "timestep_preparation"
    reads = frozenset({"spec"})
    writes = frozenset({"grid"})

    def __init__(self, noise_scheduler: NoiseScheduler, size_multiple: int) -> None:
        self.noise_scheduler = noise_scheduler
        self.size_multiple = size_multiple

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        """Make the grid of every sample; samples of one size and number of steps share it."""
        grids: dict[tuple[int, int], Grid] = {}
        for sample in samples:
            spec = sample.spec
            key = (spec.steps, image_tokens(spec.height, spec.width, self.size_multiple))
            if key not in grids:
                grids[key] = self.noise_scheduler.grid(*key)
            sample.grid = grids[key]


def image_tokens(height: int, width: int, size_multiple: int) -> int:
    """Return the tokens of an image, each a square of size_multiple pixels on a side; some grids depend on it."""
    return (height // size_multiple) * (width // size_multiple)
