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
    """The factors of x_next = x_factor * x + estimate_factor * (p1 * D0 + ...) + noise_std * z.

    Attributes:
        x_factor: The factor of the state.
        estimate_factor: The factor of the sum of estimates.
        step: The step in lambda at which the p are evaluated.
        noise_std: The standard deviation of the noise.
    """

    x_factor: float
    estimate_factor: float
    step: float
    noise_std: float

    @staticmethod
    def between(here: Point, there: Point, form: Form, stochastic: bool) -> "StepFactors":
        """Return the factors from one point to another, a step h = lambda_next - lambda apart.

        Args:
            here: The point where the step starts.
            there: The point where the step ends.
            form: The estimate that is integrated, as in `DPMSolver`.
            stochastic: Whether the step is that of the SDE, as in `DPMSolver`.

        Returns:
            The factors.
        """
        h = there.log_snr - here.log_snr
        if form == "noise":
            return StepFactors(there.alpha / here.alpha, there.sigma, -h, 0.0)
        x_factor = there.sigma / here.sigma
        if not stochastic:
            return StepFactors(x_factor, there.alpha, h, 0.0)
        return StepFactors(x_factor * math.exp(-h), there.alpha, 2 * h, there.sigma * math.sqrt(-math.expm1(-2 * h)))


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver and DPM-Solver++, multistep.

    With h the step in lambda, D0 the newest estimate, and D1 and D2 its divided differences over the last rows,

        x_next = (sigma_next / sigma) * x + alpha_next * (p1 * D0 + p2 * D1 + p3 * D2),
        p1 = 1 - e^-h,    p2 = 1 - p1 / h  (or p1 / 2, "midpoint" at order 2),    p3 = 2 * (p1 - h) / h^2 + 1.

    D2 is the second divided difference, half a second derivative, and p3 integrates it in full: order 3 measures 3. The
    authors' code, diffusers and k-diffusion weigh D2 by half, and their third order measures 2.

    Convention: diffusers' DPMSolverMultistepScheduler.

    Attributes:
        order: The order, 1 to 3.
        kind: The form of p2 at order 2, "midpoint" or "heun".
        form: The estimate that is integrated. "data" is x0: DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095, Algorithm
            2). "noise" is eps: DPM-Solver (arXiv 2206.00927), the same formulas with alpha and sigma exchanged and h
            negated. It cannot step to sigma = 0.
        stochastic: Whether the step is the SDE form of the data formulas (diffusers' "sde-dpmsolver++"). It has 2 h in
            place of h, x scaled by e^-h once more, and noise sigma_next * sqrt(1 - e^-2h) * z.
        lower_order_final: Whether a grid of fewer than 15 steps ends in steps of falling order.
        euler_at_final: Whether the last step is first order on any grid.
        halve_d2: Whether D2 is weighed by half, as in diffusers.

    Raises:
        ValueError: The order is outside 1 to 3, or form="noise" is combined with stochastic=True.
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
            raise ValueError("the SDE form integrates x0; use form=data with it")

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Take one multistep step. Raise ValueError if form="noise" would step from alpha = 0 or to sigma = 0."""
        here, there = grid[i], grid[i + 1]
        state.append(here, denoise(x, here), self.order)
        h = there.log_snr - here.log_snr
        if self.form == "noise" and not math.isfinite(h):
            raise ValueError(
                "DPM-Solver in the noise form cannot step from alpha = 0 or to sigma = 0; use form=data, or end=t_min"
            )
        order = min(multistep_order(self.order, i, grid, self.lower_order_final), len(state.history))
        if self.euler_at_final and i == grid.steps - 1:
            order = 1
        factors = StepFactors.between(here, there, self.form, self.stochastic)
        x_next = factors.x_factor * x + factors.estimate_factor * self._sum(state, order, h, factors.step)
        return x_next + factors.noise_std * noise(i).to(x) if factors.noise_std > 0 else x_next

    def _sum(self, state: SolverState, order: int, h: float, step: float) -> Tensor:
        """Return p1 * D0 + p2 * D1 + p3 * D2, with the p evaluated at `step` and the differences in units of h."""
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
        """Return the number of steps: one evaluation per step."""
        return grid.steps
