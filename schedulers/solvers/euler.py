"""First order: the left end-point of (*), without noise (Euler) and with noise (DDIM's eta, the ancestral step)."""

import math
from dataclasses import dataclass

from torch import Tensor

from schedulers.grid import Grid
from schedulers.solvers.base import Denoise, Noise, SolverState


@dataclass(frozen=True)
class Euler:
    """Euler's method: x_next = alpha_next * x0 + sigma_next * eps.

    DDIM with eta = 0 (Song et al. 2020, arXiv 2010.02502, equation 13), Euler on a VE grid (Karras et al. 2022, arXiv
    2206.00364, Algorithm 1 without its correction), and the Euler step of rectified flow (Liu et al. 2022, arXiv
    2209.03003, section 2.1).
    """

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Take one step of Euler's method."""
        there = grid.landing(i)
        now = denoise(x, grid[i])
        return there.alpha * now.x0 + there.sigma * now.eps

    def evaluations(self, grid: Grid) -> int:
        """Return the number of steps: one evaluation per step."""
        return grid.steps


@dataclass(frozen=True)
class DDIM:
    """DDIM with noise of strength eta.

        x_next = alpha_next * x0 + sqrt(sigma_next^2 - s^2) * eps + s * z,    z standard normal,
        s = eta * sigma_next * sqrt(1 - (r_next / r)^2),    r = sigma / alpha.

    Song et al. 2020 (arXiv 2010.02502), equations 12 and 16, which this equals on a VP path.

    Attributes:
        eta: The strength of the noise, 0 to 1. 0 is Euler; 1 is the DDPM posterior (Ho et al. 2020, arXiv 2006.11239,
            equations 6 and 7). On a VE grid, 1 is also the ancestral step of Song et al. 2021 (arXiv 2011.13456,
            equation 47) and of k-diffusion.

    Raises:
        ValueError: eta is outside [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta}; give a number from 0 (no noise) to 1 (the DDPM posterior)")

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Take one step of DDIM."""
        here, there = grid[i], grid.landing(i)
        now = denoise(x, here)
        shrink = there.sigma * here.alpha / (there.alpha * here.sigma)  # r_next / r, which is 0 if r is infinite
        s = self.eta * there.sigma * math.sqrt(max(0.0, 1 - shrink**2))
        x_next = there.alpha * now.x0 + math.sqrt(there.sigma**2 - s**2) * now.eps
        return x_next + s * noise(i).to(x) if s > 0 else x_next

    def evaluations(self, grid: Grid) -> int:
        """Return the number of steps: one evaluation per step."""
        return grid.steps
