"""The probability-flow ODE by an adaptive Runge-Kutta method, which decides itself how often to call the network."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from schedulers.grid import Grid, Point
from schedulers.prediction import Estimate
from schedulers.solvers.base import Denoise, Noise, SolverState

# Dormand and Prince 1980: stages, fifth-order weights, and the difference from the fourth-order ones.
C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@dataclass(frozen=True)
class RK45:
    """In the coordinates y = x / (alpha + sigma) and u = sigma / (alpha + sigma), in which (*) reads on every path

        dy / du = eps - x0,    u from 1 (noise) to 0 (data),

    Dormand-Prince 5(4) with steps accepted while the error of every sample, in root mean square of
    error / (atol + rtol * |y|), is at most 1. Song et al. 2021 (arXiv 2011.13456), section 4.3 and appendix D.4, use
    the same method (SciPy's RK45) in the path's own time. Rows of the grid are hit exactly, so one step is enough; from
    u = clean_below the estimate of x0 is the result, since the network is never called at sigma = 0. The number of
    evaluations depends on the sample: `evaluations` says None, and whoever wraps denoise counts them. The step size is
    shared by a batch. Raises ValueError for tolerances that are not above 0.
    """

    rtol: float = 1e-3
    atol: float = 1e-3
    clean_below: float = 1e-3
    max_evaluations: int = 10_000

    def __post_init__(self) -> None:
        if min(self.rtol, self.atol, self.clean_below) <= 0 or self.clean_below >= 1:
            raise ValueError(
                f"rk45 needs rtol, atol > 0 and 0 < clean_below < 1, got {self.rtol}, {self.atol}, {self.clean_below}"
            )

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """See the class. Raises ValueError when the tolerances ask for more than max_evaluations in one step."""
        here, there = grid[i], grid[i + 1]
        nearest = _u(grid.at_ratio(0.0))  # a discrete path has no point below its first index
        u, end, calls = _u(here), max(_u(there), self.clean_below, nearest), 1
        y = x / (here.alpha + here.sigma)
        slope, now = self._slope(y, here, denoise)
        size = state.step_size or (u - end) / 8
        while u > end:
            size = min(size, u - end)
            stop = end if size == u - end else u - size
            proposed, then, error = self._trial_step(y, u, stop - u, slope, grid, denoise)
            calls += 6
            if calls > self.max_evaluations:
                raise ValueError(
                    f"rk45 needs more than {self.max_evaluations} evaluations; raise rtol={self.rtol}, atol={self.atol}"
                )
            if error <= 1:
                y, u, (slope, now) = proposed, stop, then
                state.step_size = size
            size *= min(5.0, max(0.2, 0.9 * error**-0.2)) if error > 0 else 5.0
        if there.sigma == 0:
            return now.x0
        return (there.alpha + there.sigma) * y

    def _trial_step(
        self, y: Tensor, u: float, du: float, slope: Tensor, grid: Grid, denoise: Denoise
    ) -> tuple[Tensor, tuple[Tensor, Estimate], float]:
        """One trial: the state at u + du, its slope and estimate there, and the error in units of the tolerance."""
        slopes = [slope]
        for c, row in zip(C[1:], A[1:], strict=True):
            slopes.append(self._slope(y + du * _weighted_sum(row, slopes), _at(grid, u + c * du), denoise)[0])
        proposed = y + du * _weighted_sum(B, slopes)
        last = self._slope(proposed, _at(grid, u + du), denoise)
        scale = self.atol + self.rtol * torch.maximum(y.abs(), proposed.abs())
        scaled_error = du * _weighted_sum(E, [*slopes, last[0]]) / scale
        error_per_sample = scaled_error.reshape(len(scaled_error), -1).square().mean(dim=-1).sqrt()
        return proposed, last, float(error_per_sample.max())

    @staticmethod
    def _slope(y: Tensor, point: Point, denoise: Denoise) -> tuple[Tensor, Estimate]:
        estimate = denoise((point.alpha + point.sigma) * y, point)
        return estimate.eps - estimate.x0, estimate

    def evaluations(self, grid: Grid) -> None:
        """Unknown beforehand."""
        return


def _u(point: Point) -> float:
    return point.sigma / (point.alpha + point.sigma)


def _at(grid: Grid, u: float) -> Point:
    return grid.at_ratio(u / (1 - u) if u < 1 else math.inf)


def _weighted_sum(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for w, slope in zip(weights[1:], slopes[1:], strict=True):
        if w:
            total = total + w * slope
    return total
