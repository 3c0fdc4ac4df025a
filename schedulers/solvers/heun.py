"""Second order with two evaluations a step: the trapezoid of (*)."""

from dataclasses import dataclass

from torch import Tensor

from schedulers.grid import Grid
from schedulers.solvers.base import Denoise, Memory, Noise


@dataclass(frozen=True)
class Heun:
    """An Euler step to x', a second estimate (x0', eps') there, and

        x_next = x + (alpha_next - alpha) * (x0 + x0') / 2 + (sigma_next - sigma) * (eps + eps') / 2.

    Karras et al. 2022 (arXiv 2206.00364), Algorithm 2 with S_churn = 0, to which it reduces at alpha = 1. A step that
    ends at sigma = 0 is the Euler step alone, as in the paper. The result depends on the path's coordinates, unlike
    Euler's.
    """

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, memory: Memory, noise: Noise) -> Tensor:
        """See the class."""
        here, there = grid[i], grid[i + 1]
        now = denoise(x, here)
        euler = there.alpha * now.x0 + there.sigma * now.eps
        if there.sigma == 0:
            return euler
        then = denoise(euler, there)
        d_alpha, d_sigma = there.alpha - here.alpha, there.sigma - here.sigma
        return x + d_alpha / 2 * (now.x0 + then.x0) + d_sigma / 2 * (now.eps + then.eps)

    def evaluations(self, grid: Grid) -> int:
        """Two a step, one where the step ends at sigma = 0."""
        return 2 * grid.steps - int((grid.sigma[1:] == 0).sum())
