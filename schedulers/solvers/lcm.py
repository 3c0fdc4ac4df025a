"""Sampling of consistency models: jump to x0, add the next row's noise afresh."""

from dataclasses import dataclass

from torch import Tensor

from schedulers.grid import Grid
from schedulers.solvers.base import Denoise, Memory, Noise


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

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, memory: Memory, noise: Noise) -> Tensor:
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
