"""Sampling of consistency models: jump to x0 (or short of the next row), then add new noise for the next row."""

import math
from dataclasses import dataclass

from torch import Tensor

from schedulers.grid import Grid
from schedulers.solvers.base import Denoise, Noise, SolverState


@dataclass(frozen=True)
class LCM:
    """Multistep consistency sampling: x_next = alpha_next * f + sigma_next * z, z standard normal.

        f = c_skip * x + c_out * x0,    c_skip = d^2 / (u^2 + d^2),    c_out = u / sqrt(u^2 + d^2),

    with u = timestep_scaling * tau and d = sigma_data. Luo et al. 2023 (arXiv 2310.04378), Algorithm 3.

    Attributes:
        boundary: Whether f has the boundary scalings c_skip and c_out, as in diffusers' LCMScheduler. False uses f =
            x0, as its FlowMatchLCMScheduler does.
        timestep_scaling: The factor of tau in the boundary scalings.
        sigma_data: The standard deviation of the data in the boundary scalings.
    """

    boundary: bool = True
    timestep_scaling: float = 10.0
    sigma_data: float = 0.5

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Take one step of consistency sampling."""
        here, there = grid[i], grid[i + 1]
        f = denoise(x, here).x0
        if self.boundary:
            u = self.timestep_scaling * here.tau
            total = u**2 + self.sigma_data**2
            f = self.sigma_data**2 / total * x + u / total**0.5 * f
        return there.alpha * f + there.sigma * noise(i).to(x) if there.sigma > 0 else f

    def evaluations(self, grid: Grid) -> int:
        """Return the number of steps: one evaluation per step."""
        return grid.steps


@dataclass(frozen=True)
class TCD:
    """Trajectory consistency: Euler's step to s = floor((1 - gamma) * t_next), then noise back up to the next row.

        x_s = alpha_s * x0 + sigma_s * eps,    x_next = k * x_s + sqrt(sigma_next^2 - (k * sigma_s)^2) * z,

    k = alpha_next / alpha_s, z standard normal. The last step stops at x_s. Zheng et al. 2024 (arXiv 2402.19159),
    strategic stochastic sampling, in the convention of diffusers' TCDScheduler, where gamma is called eta. It is for
    trained indices, which the floor keeps whole.

    Attributes:
        gamma: The share of the next row's noise that is new, 0 to 1.

    Raises:
        ValueError: gamma is outside [0, 1].
    """

    gamma: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}; give a number from 0 (no noise) to 1 (all of it new)")

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Take one step of TCD."""
        there, now = grid[i + 1], denoise(x, grid[i])
        beyond = grid.at_time(math.floor((1 - self.gamma) * there.t))
        x_s = beyond.alpha * now.x0 + beyond.sigma * now.eps
        if self.gamma == 0 or i == grid.steps - 1:
            return x_s
        k = there.alpha / beyond.alpha
        return k * x_s + math.sqrt(there.sigma**2 - (k * beyond.sigma) ** 2) * noise(i).to(x)

    def evaluations(self, grid: Grid) -> int:
        """Return the number of steps: one evaluation per step."""
        return grid.steps
