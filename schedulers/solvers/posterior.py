"""Ancestral sampling with the DDPM posterior, its variance small, large or learned."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from schedulers.grid import Grid, Point
from schedulers.prediction import Estimate
from schedulers.solvers.base import Denoise, Noise, SolverState

Variance = Literal["small", "large", "learned_range", "learned"]


@dataclass(frozen=True)
class DDPM:
    """The DDPM posterior: x_next = alpha_next * ((1 - k) * x0 + k * x / alpha) + s * z, with k = (r_next / r)^2.

    Here r = sigma / alpha. Ho et al. 2020 (arXiv 2006.11239), equations 6, 7 and 11, on any Gaussian path. The mean is
    a function of x and x0, so it uses the clipped x0. The variance s^2 is

        small          sigma_next^2 * (1 - k)                 the posterior's own (beta-tilde)
        large          sigma^2 * (1 - k)                      the forward step's (beta), which depends on coordinates
        learned_range  small^(1 - v) * large^v                v = (output + 1) / 2, Nichol and Dhariwal 2021
                                                              (arXiv 2102.09672), equation 15
        learned        the output itself

    Attributes:
        variance: The variance, from the table above. The two learned ones need a checkpoint with twice the channels
            (prediction.LearnedVariance).
        final_noise: Whether a step to sigma = 0 adds noise. diffusers adds it whenever the step starts above the first
            trained index.
    """

    variance: Variance = "small"
    final_noise: bool = False

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Take one step of the posterior. Raise ValueError if the variance is learned and the output has none."""
        here, there = grid[i], grid.landing(i)
        now = denoise(x, here)
        k = (there.sigma * here.alpha / (there.alpha * here.sigma)) ** 2
        # k / alpha, written so that it is 0 and not 0 / 0 at alpha = 0
        k_over_alpha = here.alpha * (there.sigma / (there.alpha * here.sigma)) ** 2
        mean = there.alpha * ((1 - k) * now.x0 + k_over_alpha * x)
        if there.sigma == 0 and not (self.final_noise and here.t > 0):
            return mean
        s = self._noise_std(here, there, k, now)
        return mean + s * noise(i).to(x) if isinstance(s, Tensor) or s > 0 else mean

    def _noise_std(self, here: Point, there: Point, k: float, now: Estimate) -> Tensor | float:
        small, large = there.sigma * math.sqrt(1 - k), here.sigma * math.sqrt(1 - k)
        if self.variance == "small":
            return small
        if self.variance == "large":
            return large
        if now.variance is None:
            raise ValueError(
                f"variance={self.variance} needs a checkpoint that outputs one, with twice the channels of the state; "
                "use variance=small or large"
            )
        if self.variance == "learned":
            return now.variance.clamp(min=0).sqrt()
        fraction = (now.variance + 1) / 2
        log_small, log_large = math.log(max(small, 1e-10)), math.log(max(large, 1e-10))
        return torch.exp(fraction * log_large + (1 - fraction) * log_small)

    def evaluations(self, grid: Grid) -> int:
        """Return the number of steps: one evaluation per step."""
        return grid.steps
