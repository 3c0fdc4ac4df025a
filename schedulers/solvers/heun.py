"""Second order with two evaluations per step: the trapezoid of (*), and the midpoint."""

import math
from dataclasses import dataclass

from torch import Tensor

from schedulers.grid import Grid
from schedulers.solvers.base import Denoise, Noise, SolverState


@dataclass(frozen=True)
class Heun:
    """Heun's method: an Euler step to x', a second estimate (x0', eps') there, and the mean of both estimates.

        x_next = x + (alpha_next - alpha) * (x0 + x0') / 2 + (sigma_next - sigma) * (eps + eps') / 2.

    At alpha = 1 this is Karras et al. 2022 (arXiv 2206.00364), Algorithm 2 with S_churn = 0. A step that ends at sigma
    = 0 is the Euler step alone, as in the paper. The result depends on the path's coordinates, unlike Euler's.
    """

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Take one step of Heun's method."""
        here, there = grid[i], grid[i + 1]
        now = denoise(x, here)
        euler = there.alpha * now.x0 + there.sigma * now.eps
        if there.sigma == 0:
            return euler
        then = denoise(euler, there)
        d_alpha, d_sigma = there.alpha - here.alpha, there.sigma - here.sigma
        return x + d_alpha / 2 * (now.x0 + then.x0) + d_sigma / 2 * (now.eps + then.eps)

    def evaluations(self, grid: Grid) -> int:
        """Return two evaluations per step, one for a step that ends at sigma = 0."""
        return 2 * grid.steps - int((grid.sigma[1:] == 0).sum())


@dataclass(frozen=True)
class DPM2:
    """The midpoint method in log(sigma / alpha): an Euler step to r_mid = sqrt(r * r_down), then an estimate eps'.

        x / alpha at r_down  =  x / alpha + (r_down - r) * eps',    r_down^2 + r_up^2 = r_next^2,

    then noise of standard deviation alpha_next * r_up, where r_up = eta * r_next * sqrt(1 - (r_next / r)^2). A step
    from alpha = 0 or to sigma = 0 is an Euler step. The result depends on the coordinates only through the rows.

    Attributes:
        eta: The strength of the noise, 0 to 1. 0 is k-diffusion's DPM2 (Karras et al. 2022, arXiv 2206.00364, Algorithm
            2 with its midpoint variant; diffusers' KDPM2); 1 is its ancestral form.

    Raises:
        ValueError: eta is outside [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta}; give a number from 0 (no noise) to 1 (ancestral)")

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Take one step of the midpoint method."""
        here, there = grid[i], grid[i + 1]
        now = denoise(x, here)
        if here.alpha == 0 or there.sigma == 0:
            return there.alpha * now.x0 + there.sigma * now.eps
        up = self.eta * there.ratio * math.sqrt(max(0.0, 1 - (there.ratio / here.ratio) ** 2))
        down = math.sqrt(there.ratio**2 - up**2)
        middle = grid.at_ratio(math.sqrt(here.ratio * down))
        then = denoise(middle.alpha * now.x0 + middle.sigma * now.eps, middle)
        x_next = there.alpha * (x / here.alpha + (down - here.ratio) * then.eps)
        return x_next + there.alpha * up * noise(i).to(x) if up > 0 else x_next

    def evaluations(self, grid: Grid) -> int:
        """Return two evaluations per step, one for a step that starts at alpha = 0 or ends at sigma = 0."""
        return 2 * grid.steps - int(((grid.sigma[1:] == 0) | (grid.alpha[:-1] == 0)).sum())
