"""Sampling of consistency models: jump to x0 (or short of the next row), then add the next row's noise afresh."""

import math
from dataclasses import dataclass

from torch import Tensor

from schedulers.grid import Grid
from schedulers.solvers.base import Denoise, Noise, SolverState


@dataclass(frozen=True)
class LCM:
    """x_next = alpha_next * f + sigma_next * z,    f = c_skip * x + c_out * x0, z standard normal.

    Multistep consistency sampling, Luo et al. 2023 (arXiv 2310.04378), Algorithm 3. The boundary scalings
    c_skip = d^2 / (u^2 + d^2), c_out = u / sqrt(u^2 + d^2), u = timestep_scaling * tau, d = sigma_data, are those of
    diffusers' LCMScheduler; boundary=False leaves f = x0, as its FlowMatchLCMScheduler does.
    """

    boundary: bool = True
    timestep_scaling: float = 10.0
    sigma_data: float = 0.5

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """See the class."""
        here, there = grid[i], grid[i + 1]
        f = denoise(x, here).x0
        if self.boundary:
            u = self.timestep_scaling * here.tau
            total = u**2 + self.sigma_data**2
            f = self.sigma_data**2 / total * x + u / total**0.5 * f
        return there.alpha * f + there.sigma * noise(i).to(x) if there.sigma > 0 else f

    def evaluations(self, grid: Grid) -> int:
        """One a step."""
        return grid.steps


@dataclass(frozen=True)
class TCD:
    """Euler's step beyond the next row, to the time s = floor((1 - gamma) * t_next), and noise back up to the row:

        x_s = alpha_s * x0 + sigma_s * eps,    x_next = k * x_s + sqrt(sigma_next^2 - (k * sigma_s)^2) * z,

    k = alpha_next / alpha_s, z standard normal. The last step stops at x_s. Zheng et al. 2024 (arXiv 2402.19159),
    strategic stochastic sampling, in the convention of diffusers' TCDScheduler, where gamma is called eta; for trained
    indices, which the floor keeps whole. Raises ValueError when gamma is outside [0, 1].
    """

    gamma: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}; give a number from 0 (no noise) to 1 (all of it fresh)")

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """See the class."""
        there, now = grid[i + 1], denoise(x, grid[i])
        beyond = grid.at_time(math.floor((1 - self.gamma) * there.t))
        x_s = beyond.alpha * now.x0 + beyond.sigma * now.eps
        if self.gamma == 0 or i == grid.steps - 1:
            return x_s
        k = there.alpha / beyond.alpha
        return k * x_s + math.sqrt(there.sigma**2 - (k * beyond.sigma) ** 2) * noise(i).to(x)

    def evaluations(self, grid: Grid) -> int:
        """One a step."""
        return grid.steps
