"""Latent preparation, and the noise of stochastic steps: sampled on the CPU with one generator per image.

A seed gives the same noise on every device, in any batch and on any rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.pipeline.state import RunContext, Sample, require
from models.components import LatentSpace
from schedulers.noise_scheduler import NoiseScheduler

STEP_STRIDE = 0x9E3779B97F4A7C15
"""An odd number, so that (seed, step) pairs of nearby seeds do not collide."""


class LatentPreparation:
    """Stage 4.

    Args:
        space: the geometry of the state.
        noise_scheduler: scales the noise to the state at the grid's first row.
    """

    name = "latent_preparation"
    reads = frozenset({"spec", "grid"})
    writes = frozenset({"start"})

    def __init__(self, space: LatentSpace, noise_scheduler: NoiseScheduler) -> None:
        self.space = space
        self.noise_scheduler = noise_scheduler

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        """Sample the start of every sample."""
        for sample in samples:
            spec = sample.spec
            noise = seeded_noise(spec.seed, self.space.shape(spec.height, spec.width, spec.frames)).to(run.device)
            sample.start = self.noise_scheduler.init_noise(noise, require(sample.grid))


def seeded_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Return standard normal noise of one image, float32 on the CPU; it equals diffusers' noise for that seed."""
    return torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed))[0]


def step_noise(seed: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Return standard normal noise of one image at one step, independent of earlier samples; float32 on the CPU."""
    return seeded_noise((seed + STEP_STRIDE * (step + 1)) % 2**63, shape)
