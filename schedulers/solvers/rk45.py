"""The probability-flow ODE by an adaptive Runge-Kutta method, which itself decides how often to call the network."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from schedulers.grid import Grid, Point
from schedulers.prediction import Estimate
from schedulers.solvers.base import Denoise, Noise, SolverState

# Dormand and Prince 1980: nodes C, stages A, fifth-order weights B, and their difference E to the fourth-order ones.
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
    """Dormand-Prince 5(4) with adaptive steps, in coordinates y = x / (alpha + sigma) and u = sigma / (alpha + sigma).

    On every path (*) reads, in these coordinates,

        dy / du = eps - x0,    u from 1 (noise) to 0 (data).

    A step is accepted if the error of every sample is at most 1: the root mean square of error / (atol + rtol * |y|).
    Song et al. 2021 (arXiv 2011.13456), section 4.3 and appendix D.4, use the same method (SciPy's RK45) in the path's
    own time. The method hits the grid's rows exactly, so one step is enough. The number of evaluations depends on the
    sample: `evaluations` returns None, and the wrapper of denoise counts them. A batch shares the step size.

    Attributes:
        rtol: The relative tolerance, above 0.
        atol: The absolute tolerance, above 0.
        clean_below: The u at which the estimate of x0 is the result, since the network is never called at sigma = 0.
        max_evaluations: The largest number of evaluations in one step.

    Raises:
        ValueError: A tolerance or clean_below is out of range.
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
        """Integrate to the next row. Raise ValueError if that needs more than max_evaluations evaluations."""
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
        """Take one trial step.

        Args:
            y: The state at u.
            u: The time.
            du: The step in u, negative.
            slope: The slope dy / du at u.
            grid: The source of the points.
            denoise: The network as a function of state and point.

        Returns:
            The state at u + du, its slope and estimate there, and the error in units of the tolerance.
        """
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
        """Return None: the number of evaluations is not known before the run."""
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
