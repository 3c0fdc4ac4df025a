"""Timestep preparation: the grid that the solver walks down."""

from __future__ import annotations

from harness.pipeline.state import RunContext, Sample
from schedulers.grid import Grid
from schedulers.noise_scheduler import NoiseScheduler


class TimestepPreparation:
    """Stage 3."""

    name = "timestep_preparation"
    reads = frozenset({"ask"})
    writes = frozenset({"grid"})

    def __init__(self, noise_scheduler: NoiseScheduler) -> None:
        self.noise_scheduler = noise_scheduler

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        grids: dict[int, Grid] = {}
        for sample in samples:
            steps = sample.ask.steps
            if steps not in grids:
                grids[steps] = self.noise_scheduler.grid(steps)
            sample.grid = grids[steps]
