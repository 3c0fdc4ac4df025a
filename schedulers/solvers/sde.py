"""The reverse SDE: Euler-Maruyama, EDM's churn, and Langevin corrections between predictor steps."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from schedulers.grid import Grid, Point
from schedulers.solvers.base import Denoise, Noise, Solver, SolverState
from schedulers.solvers.posterior import DDPM


@dataclass(frozen=True)
class EulerMaruyama:
    """Euler-Maruyama on the reverse SDE with f = alpha' / alpha and g^2 = 2 sigma^2 (log(sigma / alpha))'.

        x_next = x + (f * x + g^2 * eps / sigma) * dt + g * sqrt(-dt) * z,    dt = t_next - t < 0.

    Song et al. 2021 (arXiv 2011.13456), equation 6 and appendix E; the score is -eps / sigma. The last step, to sigma =
    0, adds no noise. Every row needs alpha > 0.

    Attributes:
        even_dt: Whether dt is -1 / steps instead of the grid's, as in diffusers' ScoreSdeVpScheduler; its last step
            adds noise.
    """

    even_dt: bool = False

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Take one step of Euler-Maruyama. Raise ValueError on a row with alpha = 0, where the drift is infinite."""
        here, there = grid[i], grid[i + 1]
        if here.alpha == 0 or grid.path is None:
            raise ValueError(
                "Euler-Maruyama cannot start at alpha = 0, where the drift is infinite; set sigma_first=0.999"
            )
        dt = -1 / grid.steps if self.even_dt else there.t - here.t
        f, g2 = grid.path.drift(here.t), grid.path.diffusion(here.t)
        mean = x + (f * x + g2 / here.sigma * denoise(x, here).eps) * dt
        if there.sigma == 0 and not self.even_dt:
            return mean
        return mean + math.sqrt(-g2 * dt) * noise(i).to(x)

    def evaluations(self, grid: Grid) -> int:
        """Return the number of steps: one evaluation per step."""
        return grid.steps


@dataclass(frozen=True)
class EDMChurn:
    """EDM's stochastic sampler: noise is added up to r_hat = r * (1 + gamma), then Heun's step is taken from there.

        x_hat / alpha = x / alpha + sqrt(r_hat^2 - r^2) * s_noise * z,    r = sigma / alpha,
        gamma = min(s_churn / steps, sqrt(2) - 1) if s_tmin <= r <= s_tmax, else 0.

    Karras et al. 2022 (arXiv 2206.00364), Algorithm 2, in x / alpha on any path with alpha > 0.

    Attributes:
        s_churn: The amount of noise over all steps, at least 0.
        s_tmin: The lowest r at which noise is added.
        s_tmax: The highest r at which noise is added.
        s_noise: The factor of the added noise, at least 0.
        heun: Whether the step is Heun's; False takes Euler's.

    Raises:
        ValueError: A parameter is out of range.
    """

    s_churn: float = 40.0
    s_tmin: float = 0.05
    s_tmax: float = 50.0
    s_noise: float = 1.003
    heun: bool = True

    def __post_init__(self) -> None:
        if self.s_churn < 0 or not 0 <= self.s_tmin <= self.s_tmax or self.s_noise < 0:
            raise ValueError(
                f"churn needs s_churn >= 0, 0 <= s_tmin <= s_tmax and s_noise >= 0, got {self.s_churn}, {self.s_tmin}, "
                f"{self.s_tmax} and {self.s_noise}"
            )

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Add noise and take one step. Raise ValueError on a row with alpha = 0: no point is noisier."""
        here, there = grid[i], grid[i + 1]
        if here.alpha == 0:
            raise ValueError("churn cannot start at alpha = 0, where no noise can be added; set sigma_first=0.999")
        y, hat = x / here.alpha, here
        if gamma := self._gamma(here, grid):
            hat = grid.at_ratio(here.ratio * (1 + gamma))
            added = math.sqrt(max(hat.ratio**2 - here.ratio**2, 0.0))
            y = y + added * self.s_noise * noise(i).to(x)
        now = denoise(hat.alpha * y, hat)
        y_next = y + (there.ratio - hat.ratio) * now.eps
        if self.heun and there.sigma > 0:
            then = denoise(there.alpha * y_next, there)
            y_next = y + (there.ratio - hat.ratio) / 2 * (now.eps + then.eps)
        return there.alpha * y_next

    def _gamma(self, here: Point, grid: Grid) -> float:
        inside = self.s_tmin <= here.ratio <= self.s_tmax
        return min(self.s_churn / grid.steps, math.sqrt(2) - 1) if inside else 0.0

    def evaluations(self, grid: Grid) -> int:
        """Return two evaluations per step, one for a step that ends at sigma = 0; one per step without Heun."""
        return 2 * grid.steps - int((grid.sigma[1:] == 0).sum()) if self.heun else grid.steps


@dataclass(frozen=True)
class PredictorCorrector:
    """Langevin steps at each row, then the step of a predictor.

        x <- x + e * score + sqrt(2 e) * z,    score = -eps / sigma,    e = 2 * (snr * |z| / |score|)^2,

    where |.| is the norm of one sample, averaged over the batch. The default predictor is reverse diffusion: on a VE
    path, the DDPM step with the large variance sigma^2 - sigma_next^2. Song et al. 2021 (arXiv 2011.13456), Algorithms
    2 and 4, in the convention of diffusers' ScoreSdeVeScheduler. The batch shares the step size, so a sample depends on
    the others in its batch.

    Attributes:
        predictor: The solver that takes the step to the next row.
        corrections: The number of Langevin steps per row, at least 1.
        snr: The signal-to-noise ratio of a Langevin step, above 0.
        vp_scale: Whether e is multiplied by alpha^2 of the step, as in Algorithm 5 for VP.

    Raises:
        ValueError: A parameter is out of range.
    """

    predictor: Solver = field(default_factory=lambda: DDPM("large"))
    corrections: int = 1
    snr: float = 0.15
    vp_scale: bool = False

    def __post_init__(self) -> None:
        if self.corrections < 1 or self.snr <= 0:
            raise ValueError(
                f"corrections={self.corrections} and snr={self.snr}; give at least one correction and a snr above 0"
            )

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Take the Langevin steps at the row, then the predictor's step."""
        here, there = grid[i], grid[i + 1]
        for k in range(self.corrections):
            z = noise(i + (k + 1) * grid.steps).to(x)
            score = -denoise(x, here).eps / here.sigma
            size = 2 * (self.snr * _norm(z) / _norm(score)) ** 2
            if self.vp_scale:
                size = size * (here.alpha / there.alpha) ** 2
            x = x + size * score + (2 * size).sqrt() * z
        return self.predictor.step(x, i, grid, denoise, state, noise)

    def evaluations(self, grid: Grid) -> int | None:
        """Return the predictor's evaluations plus one per Langevin step."""
        predicted = self.predictor.evaluations(grid)
        return None if predicted is None else predicted + self.corrections * grid.steps


def _norm(x: Tensor) -> Tensor:
    """Return the mean over the batch (the first dimension) of the Euclidean norm of a sample."""
    return torch.linalg.vector_norm(x.reshape(len(x), -1), dim=-1).mean()
