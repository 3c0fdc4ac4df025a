"""UniPC: a predictor and, from the next evaluation at no extra cost, a corrector of one order more."""

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
    """With h the step in lambda = log(alpha / sigma), m_0 the estimate of x0 at its start and m_j at other points,

        x_next = (sigma_next / sigma) * x + alpha_next * (1 - e^-h) * m_0 - alpha_next * B(h) * sum_j rho_j D_j,
        D_j = (m_j - m_0) / r_j,    r_j = (lambda_j - lambda_0) / h,    B = -h ("bh1") or e^-h - 1 ("bh2"),

    the rho solving  sum_j r_j^(k-1) rho_j = b_k. The predictor (UniP-p) uses p - 1 earlier points; the corrector
    (UniC-p) steps again to the same row with the estimate made there, so the order is p + 1. form="noise" exchanges
    alpha and sigma and negates h. Zhao et al. 2023 (arXiv 2302.04867), Algorithms 1 and 2, in the convention of
    diffusers' UniPCMultistepScheduler: rho = 1/2 for UniP-2 and UniC-1; with lower_order_final the last steps of every
    grid are of falling order. corrector=False leaves the predictor alone; uncorrected lists steps whose result is not
    corrected. Raises ValueError for an order outside 1 to 3.
    """

    order: int = 2
    b: Literal["bh1", "bh2"] = "bh2"
    form: Literal["data", "noise"] = "data"
    lower_order_final: bool = True
    corrector: bool = True
    disable_corrector: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"order={self.order}; UniPC is offered with orders 1, 2 and 3")

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """See the class. Raises ValueError when form="noise" is asked to step from alpha = 0 or to sigma = 0."""
        here, there = grid[i], grid[i + 1]
        now = denoise(x, here)
        if self.corrector and i - 1 not in self.disable_corrector and state.sample is not None and state.order > 0:
            x = self._update(state.sample, state.history, here, state.order, now)
        state.append(here, now, self.order)
        order = min(self.order, grid.steps - i) if self.lower_order_final else self.order
        order = min(order, i + 1 if grid.alpha[0] > 0 else max(i, 1))
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
        """From the last row of history to `there`: predicted, or corrected where `then` is the estimate made there."""
        here, latest = history[-1]
        h = there.log_snr - here.log_snr
        a_next, x_factor, step = there.alpha, there.sigma / here.sigma, -h
        if self.form == "noise":
            a_next, x_factor, step = there.sigma, there.alpha / here.alpha, h
        m0, phi = self._value(latest), math.expm1(step)
        x_next = x_factor * x - a_next * phi * m0
        others = [(self._value(e), (point.log_snr - here.log_snr) / h) for point, e in history[-2 : -order - 1 : -1]]
        if then is not None:
            others.append((self._value(then), 1.0))
        if not others or h == 0:
            return x_next
        scale = phi if self.b == "bh2" else step
        for rho, (m, r) in zip(self._rho([r for _, r in others], step, scale, order, then), others, strict=True):
            x_next = x_next - a_next * scale * float(rho) * ((m - m0) / r)
        return x_next

    def _rho(
        self, ratios: list[float], step: float, scale: float, order: int, then: Estimate | None
    ) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
        """The weights of the differences, from the order conditions."""
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
        """One a step."""
        return grid.steps
