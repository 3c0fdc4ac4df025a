"""Linear multistep methods on eps: Adams-Bashforth in sigma / alpha (LMS), in its logarithm (DEIS), by index (PNDM)."""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from schedulers.grid import Grid, Point
from schedulers.prediction import Estimate
from schedulers.solvers.base import Denoise, Noise, SolverState, multistep_order


def _weights(nodes: list[float], moments: list[float]) -> list[float]:
    """Return c with sum_j c_j nodes_j^k = moments_k, which integrates the polynomial through the nodes."""
    powers = np.array([[node**k for node in nodes] for k in range(len(nodes))])
    return [float(c) for c in np.linalg.solve(powers, np.array(moments))]


def _advance(x: Tensor, here: Point, there: Point, terms: list[tuple[float, Tensor]]) -> Tensor:
    """Return x_next, where x_next / alpha_next = x / alpha + sum_j c_j eps_j."""
    y = x / here.alpha
    for c, eps in terms:
        y = y + c * eps
    return there.alpha * y


@dataclass(frozen=True)
class LMS:
    """Linear multistep: x / alpha integrated over r = sigma / alpha, with a polynomial through the last values of eps.

        x_next / alpha_next = x / alpha + sum_j c_j eps_j,    c_j = integral of l_j(r) dr from r to r_next.

    k-diffusion's LMS (diffusers' LMSDiscreteScheduler), with exact integrals instead of quadrature. A step from alpha =
    0 is an Euler step.

    Attributes:
        order: The number of values of eps, 1 to 4.

    Raises:
        ValueError: The order is outside 1 to 4.
    """

    order: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 4:
            raise ValueError(f"order={self.order}; LMS has orders 1 to 4")

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Take one linear multistep step."""
        here, there = grid[i], grid[i + 1]
        now = denoise(x, here)
        if here.alpha == 0:
            return there.alpha * now.x0 + there.sigma * now.eps
        state.append(here, now, self.order)
        past = state.history[::-1]
        length = there.ratio - here.ratio
        moments = [length ** (k + 1) / (k + 1) for k in range(len(past))]
        c = _weights([point.ratio - here.ratio for point, _ in past], moments)
        return _advance(x, here, there, [(c_j, e.eps) for c_j, (_, e) in zip(c, past, strict=True)])

    def evaluations(self, grid: Grid) -> int:
        """Return the number of steps: one evaluation per step."""
        return grid.steps


@dataclass(frozen=True)
class DEIS:
    """Like LMS, with the polynomial in log(r): tAB-DEIS in log rho.

        c_j = integral of l_j(log r) dr from r to r_next.

    Zhang and Chen 2022 (arXiv 2204.13902), equation 15, in the convention of diffusers' DEISMultistepScheduler. Steps
    from alpha = 0 and to sigma = 0 are Euler steps.

    Attributes:
        order: The number of values of eps, 1 to 3.
        lower_order_final: Whether the last steps of a short grid descend to first order.

    Raises:
        ValueError: The order is outside 1 to 3.
    """

    order: int = 2
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 3:
            raise ValueError(f"order={self.order}; DEIS has orders 1 to 3")

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Take one step of DEIS."""
        here, there = grid[i], grid[i + 1]
        now = denoise(x, here)
        state.append(here, now, self.order)
        order = min(multistep_order(self.order, i, grid, self.lower_order_final), len(state.history))
        if order == 1:
            return there.alpha * now.x0 + there.sigma * now.eps
        past = state.history[: -order - 1 : -1]
        u = here.log_snr - there.log_snr  # log of r_next / r
        moments = [here.ratio * math.expm1(u)]
        for k in range(1, order):
            moments.append(u**k * there.ratio - k * moments[-1])
        c = _weights([here.log_snr - point.log_snr for point, _ in past], moments)
        return _advance(x, here, there, [(c_j, e.eps) for c_j, (_, e) in zip(c, past, strict=True)])

    def evaluations(self, grid: Grid) -> int:
        """Return the number of steps: one evaluation per step."""
        return grid.steps


AB = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@dataclass(frozen=True)
class PNDM:
    """DDIM's step with eps replaced by eps', the Adams-Bashforth sum (orders up to 4) over the last evaluations.

    Liu et al. 2022 (arXiv 2202.09778), equations 11 to 13, for rows even in time. Every row needs alpha > 0. Half steps
    are taken half-way in time.

    Attributes:
        runge_kutta: Whether the first three steps take the Runge-Kutta form, four evaluations each. False starts with
            one improved Euler step and rising orders (PLMS of Stable Diffusion; diffusers' PNDMScheduler with
            skip_prk_steps). A single step is then an Euler step.
        whole_times: Whether the half length is rounded down from either end, as for trained indices. If it is odd, the
            second evaluation takes a state at the middle from `here`, with the timestep of the middle from `there`.
    """

    runge_kutta: bool = False
    whole_times: bool = False

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Take one step of PNDM."""
        here, there = grid[i], grid[i + 1]
        now = denoise(x, here)
        state.append(here, now, 4, distinct=False)
        if self.runge_kutta and i < 3:
            return self._runge_kutta(x, here, there, now, grid, denoise)
        past = [e.eps for _, e in state.history[::-1]]
        if len(past) == 1 and there.sigma > 0 and grid.steps > 1:
            return _ddim_step(x, here, there, (now.eps + denoise(_ddim_step(x, here, there, now.eps), there).eps) / 2)
        eps = now.eps
        if len(past) > 1:
            eps = AB[len(past)][0] * past[0]
            for c, e in zip(AB[len(past)][1:], past[1:], strict=True):
                eps = eps + c * e
        return _ddim_step(x, here, there, eps)

    def _runge_kutta(self, x: Tensor, here: Point, there: Point, now: Estimate, grid: Grid, denoise: Denoise) -> Tensor:
        """Take a step of equation 13: four evaluations, at `here`, twice half-way in time, and at `there`."""
        if there.sigma == 0:
            return _ddim_step(x, here, there, now.eps)
        half = (here.t - there.t) / 2
        half = math.floor(half) if self.whole_times else half
        first, middle = grid.at_time(here.t - half), grid.at_time(there.t + half)
        second = denoise(_ddim_step(x, here, first, now.eps), middle).eps
        third = denoise(_ddim_step(x, here, middle, second), middle).eps
        fourth = denoise(_ddim_step(x, here, there, third), there).eps
        return _ddim_step(x, here, there, (now.eps + 2 * second + 2 * third + fourth) / 6)

    def evaluations(self, grid: Grid) -> int:
        """Return one evaluation per step, one more for the improved Euler start, three more per Runge-Kutta step."""
        starts = (grid.sigma[1:] > 0)[: 3 if self.runge_kutta else min(1, grid.steps - 1)]
        return grid.steps + int(starts.sum()) * (3 if self.runge_kutta else 1)


def _ddim_step(x: Tensor, here: Point, there: Point, eps: Tensor) -> Tensor:
    """Take DDIM's step with a given eps (PNDM's equation 11)."""
    return there.alpha * ((x - here.sigma * eps) / here.alpha) + there.sigma * eps
