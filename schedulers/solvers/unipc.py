"""UniPC: a predictor, and a corrector of one order more that reuses the next evaluation at no extra cost."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from schedulers.grid import Grid, Point
from schedulers.prediction import Estimate
from schedulers.solvers.base import Denoise, Noise, SolverState


@dataclass(frozen=True)
class UniPC:
    """UniPC, a multistep predictor with a corrector.

    With h the step in lambda = log(alpha / sigma), m_0 the estimate of x0 at its start and m_j at other points,

        x_next = (sigma_next / sigma) * x + alpha_next * (1 - e^-h) * m_0 - alpha_next * B(h) * sum_j rho_j D_j,
        D_j = (m_j - m_0) / r_j,    r_j = (lambda_j - lambda_0) / h,    B = -h ("bh1") or e^-h - 1 ("bh2"),

    where the rho solve sum_j r_j^(k-1) rho_j = b_k. The predictor (UniP-p) uses p - 1 earlier points. The corrector
    (UniC-p) steps again to the same row with the estimate made there, so the order is p + 1. Zhao et al. 2023 (arXiv
    2302.04867), Algorithms 1 and 2, in the convention of diffusers' UniPCMultistepScheduler: rho = 1/2 for UniP-2 and
    UniC-1.

    Attributes:
        order: The order p of the predictor, 1 to 3.
        b: The function B.
        form: The estimate that is integrated: "data" is x0; "noise" is eps, with alpha and sigma exchanged and h
            negated.
        lower_order_final: Whether the last steps of every grid are of falling order.
        corrector: Whether steps are corrected at all.
        disable_corrector: The indices of the steps whose result is not corrected.

    Raises:
        ValueError: The order is outside 1 to 3.
    """

    order: int = 2
    b: Literal["bh1", "bh2"] = "bh2"
    form: Literal["data", "noise"] = "data"
    lower_order_final: bool = True
    corrector: bool = True
    disable_corrector: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"order={self.order}; UniPC has orders 1, 2 and 3")

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Correct the last step, then predict the next.

        Args:
            x: The state at grid[i], as predicted by the last step.
            i: The index of the step.
            grid: The points.
            denoise: The network as a function of state and point.
            state: What the solver stores between steps; changed in place.
            noise: The source of noise, not used.

        Returns:
            The state at grid[i + 1].

        Raises:
            ValueError: form="noise" would step from alpha = 0 or to sigma = 0.
        """
        here, there = grid[i], grid[i + 1]
        now = denoise(x, here)
        if self.corrector and i - 1 not in self.disable_corrector and state.sample is not None and state.order > 0:
            x = self._update(state.sample, state.history, here, state.order, now)
        state.append(here, now, self.order)
        order = min(self.order, grid.steps - i) if self.lower_order_final else self.order
        order = min(order, len(state.history), i + 1 if grid.alpha[0] > 0 else max(i, 1))
        if there.sigma == 0:
            order = 1
        finite = here.alpha > 0 and there.sigma > 0
        if self.form == "noise" and not finite:
            raise ValueError(
                "UniPC in the noise form cannot step from alpha = 0 or to sigma = 0; use form=data, or end=t_min"
            )
        state.sample, state.order = x, order if finite else 0
        return self._update(x, state.history, there, order, None)

    def _update(
        self, x: Tensor, history: list[tuple[Point, Estimate]], there: Point, order: int, then: Estimate | None
    ) -> Tensor:
        """Return the state at `there`, from the last row of history.

        Args:
            x: The state at the last row of history.
            history: The points and estimates, oldest first.
            there: The point to step to.
            order: The order of the step.
            then: The estimate at `there`, which makes the step a corrector's; None for a predictor's.

        Returns:
            The state at `there`.
        """
        here, latest = history[-1]
        h = there.log_snr - here.log_snr
        a_next, x_factor, step = there.alpha, there.sigma / here.sigma, -h
        if self.form == "noise":
            a_next, x_factor, step = there.sigma, there.alpha / here.alpha, h
        m0, phi = self._value(latest), math.expm1(step)
        x_next = x_factor * x - a_next * phi * m0
        if h == 0:
            return x_next
        others = [(self._value(e), (point.log_snr - here.log_snr) / h) for point, e in history[-2 : -order - 1 : -1]]
        if then is not None:
            others.append((self._value(then), 1.0))
        if not others:
            return x_next
        scale = phi if self.b == "bh2" else step
        for rho, (m, r) in zip(self._rho([r for _, r in others], step, scale, order, then), others, strict=True):
            x_next = x_next - a_next * scale * float(rho) * ((m - m0) / r)
        return x_next

    def _rho(
        self, ratios: list[float], step: float, scale: float, order: int, then: Estimate | None
    ) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
        """Return the weights of the differences, from the order conditions."""
        if (then is None and order == 2) or (then is not None and order == 1):
            return np.array([0.5])
        count, value, factorial, moments = len(ratios), math.expm1(step) / step - 1, 1.0, []
        for k in range(1, count + 1):
            moments.append(value * factorial / scale)
            factorial *= k + 1
            value = value / step - 1 / factorial
        rows = np.array([[r**k for r in ratios] for k in range(count)])
        return np.asarray(np.linalg.solve(rows, np.array(moments)), dtype=np.float64)

    def _value(self, estimate: Estimate) -> Tensor:
        return estimate.x0 if self.form == "data" else estimate.eps

    def evaluations(self, grid: Grid) -> int:
        """Return the number of steps: one evaluation per step."""
        return grid.steps
