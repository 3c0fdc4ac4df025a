"""DPM-Solver: exponential multistep integration in lambda = log(alpha / sigma), orders 1 to 3, ODE and SDE."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from schedulers.grid import Grid, Point
from schedulers.solvers.base import Denoise, Noise, SolverState, multistep_order

Form = Literal["data", "noise"]


@dataclass(frozen=True)
class StepFactors:
    """The factors of x_next = carry * x + scale * (p1 * D0 + ...) + spread * z; the p are taken at `step`."""

    x_factor: float
    estimate_factor: float
    step: float
    noise_std: float

    @staticmethod
    def between(here: Point, there: Point, form: Form, stochastic: bool) -> "StepFactors":
        """From one point to another, h = lambda_next - lambda apart; see DPMSolver for form and stochastic."""
        h = there.log_snr - here.log_snr
        if form == "noise":
            return StepFactors(there.alpha / here.alpha, there.sigma, -h, 0.0)
        x_factor = there.sigma / here.sigma
        if not stochastic:
            return StepFactors(x_factor, there.alpha, h, 0.0)
        return StepFactors(x_factor * math.exp(-h), there.alpha, 2 * h, there.sigma * math.sqrt(-math.expm1(-2 * h)))


@dataclass(frozen=True)
class DPMSolver:
    """With h the step in lambda, D0 the newest estimate and D1, D2 its divided differences over the last rows,

        x_next = (sigma_next / sigma) * x + alpha_next * (p1 * D0 + p2 * D1 + p3 * D2),
        p1 = 1 - e^-h,    p2 = 1 - p1 / h  (or p1 / 2, "midpoint" at order 2),    p3 = 2 * (p1 - h) / h^2 + 1.

    form="data" estimates x0: DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095, Algorithm 2).
    form="noise" estimates eps: DPM-Solver (arXiv 2206.00927), the same formulas with alpha and sigma exchanged and h
    negated; it cannot step to sigma = 0. stochastic=True is the SDE form of the data formulas (diffusers'
    "sde-dpmsolver++"), with 2 h in place of h, x scaled by e^-h once more, and noise sigma_next * sqrt(1 - e^-2h) * z.

    D2 is the second divided difference, half a second derivative, and p3 integrates it in full: order 3 measures 3. The
    authors' code, diffusers and k-diffusion weigh it by half, and their third order measures 2: that is halve_d2.

    Convention: diffusers' DPMSolverMultistepScheduler. With lower_order_final, a grid of fewer than 15 steps ends in
    steps of falling order. euler_at_final makes the last step first order on any grid.
    Raises ValueError for an order outside 1 to 3, or form="noise" with stochastic=True.
    """

    order: int = 2
    kind: Literal["midpoint", "heun"] = "midpoint"
    form: Form = "data"
    stochastic: bool = False
    lower_order_final: bool = True
    euler_at_final: bool = False
    halve_d2: bool = False

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"order={self.order}; DPM-Solver has orders 1, 2 and 3")
        if self.form == "noise" and self.stochastic:
            raise ValueError("the SDE form is written for x0; use form=data with it")

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """See the class. Raises ValueError when form="noise" is asked to step to sigma = 0."""
        here, there = grid[i], grid[i + 1]
        state.append(here, denoise(x, here), self.order)
        h = there.log_snr - here.log_snr
        if self.form == "noise" and not math.isfinite(h):
            raise ValueError(
                "DPM-Solver in the noise form cannot step from alpha = 0 or to sigma = 0; use form=data, or end=t_min"
            )
        order = multistep_order(self.order, i, grid, self.lower_order_final)
        if self.euler_at_final and i == grid.steps - 1:
            order = 1
        factors = StepFactors.between(here, there, self.form, self.stochastic)
        x_next = factors.x_factor * x + factors.estimate_factor * self._sum(state, order, h, factors.step)
        return x_next + factors.noise_std * noise(i).to(x) if factors.noise_std > 0 else x_next

    def _sum(self, state: SolverState, order: int, h: float, step: float) -> Tensor:
        """p1 * D0 + p2 * D1 + p3 * D2, the p taken at `step`, the differences in units of h."""
        values = [e.x0 if self.form == "data" else e.eps for _, e in state.history]
        lambdas = [point.log_snr for point, _ in state.history]
        p1 = -math.expm1(-step)
        if order == 1 or h == 0:
            return p1 * values[-1]
        r0 = (lambdas[-1] - lambdas[-2]) / h
        first = (values[-1] - values[-2]) / r0
        if order == 2:
            return p1 * values[-1] + (p1 / 2 if self.kind == "midpoint" else 1 - p1 / step) * first
        r1 = (lambdas[-2] - lambdas[-3]) / h
        before = (values[-2] - values[-3]) / r1
        second = (first - before) / (r0 + r1)
        p2, p3 = 1 - p1 / step, 2 * (p1 - step) / step**2 + 1
        p3 = p3 / 2 if self.halve_d2 else p3
        return p1 * values[-1] + p2 * (first + r0 * second) + p3 * second

    def evaluations(self, grid: Grid) -> int:
        """One a step."""
        return grid.steps
