"""DPM-Solver in its singlestep form: blocks of one to three rows; each step starts at the first row of its block."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from schedulers.grid import Grid
from schedulers.solvers.base import Denoise, Noise, SolverState
from schedulers.solvers.dpm import Form, StepFactors


@dataclass(frozen=True)
class DPMSolverSinglestep:
    """DPM-Solver-2S and -3S: the grid's steps form blocks of `order`, and each step starts at its block's first row s.

    Lu et al. 2022 (arXiv 2206.00927, 2211.01095), in the convention of diffusers' DPMSolverSinglestepScheduler. The
    k-th step of a block is

        x_next = (sigma_next / sigma_s) * x_s + alpha_next * (p1 * m_s + p2 * D1 + p3 * D2),

    with k estimates and the p of DPMSolver at h = lambda_next - lambda_s. The second step has D1 = (m_1 - m_s) / r_1.
    With lower_order_final, or if the grid ends at sigma = 0, the last block ends in a first-order step.

    Attributes:
        order: The order and the length of a block, 1 to 3.
        kind: The form of p2. "midpoint" uses p1 / 2 for p2 in the second step. In the third step it drops D2, and D1 is
            the last difference. "heun" uses the formula above.
        form: The estimate that is integrated, as in DPMSolver.
        stochastic: Whether the step is that of the SDE, as in DPMSolver.
        lower_order_final: Whether the last block ends in a first-order step.

    Raises:
        ValueError: The order is outside 1 to 3, or form="noise" is combined with stochastic=True.
    """

    order: int = 2
    kind: Literal["midpoint", "heun"] = "midpoint"
    form: Form = "data"
    stochastic: bool = False
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3) or (self.form == "noise" and self.stochastic):
            raise ValueError(
                f"order={self.order}, form={self.form}; give an order of 1 to 3, and form=data for the SDE"
            )

    def block_positions(self, grid: Grid) -> list[int]:
        """Return the position of each step in its block, from 1. A step from alpha = 0 is a block of its own."""
        clean, first_alone = bool(grid.sigma[-1] == 0), int(grid.alpha[0] == 0)
        positions = [i % self.order + 1 for i in range(grid.steps - first_alone)]
        if (self.lower_order_final or clean) and positions and len(positions) % self.order == 0 and self.order > 1:
            positions[-self.order :] = [1, 2, 1] if self.order == 3 else [1, 1]
        positions = [1] * first_alone + positions
        if clean:
            positions[-1] = 1
        return positions

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Take one step from the first row of the block."""
        there, position = grid[i + 1], self.block_positions(grid)[i]
        state.append(grid[i], denoise(x, grid[i]), self.order, distinct=False)
        if position == 1:
            state.sample = x
        start, _ = state.history[-position]
        assert state.sample is not None  # the first step of every block sets it
        h = there.log_snr - start.log_snr
        factors = StepFactors.between(start, there, self.form, self.stochastic)
        x_next = factors.x_factor * state.sample + factors.estimate_factor * self._sum(state, position, h, factors.step)
        return x_next + factors.noise_std * noise(i).to(x) if factors.noise_std > 0 else x_next

    def _sum(self, state: SolverState, position: int, h: float, step: float) -> Tensor:
        """Return p1 * m_s + p2 * D1 + p3 * D2, of the rows with different noise levels."""
        block = state.history[-position:]
        block = [block[0], *(b for a, b in itertools.pairwise(block) if a[0].ratio != b[0].ratio)]
        values = [e.x0 if self.form == "data" else e.eps for _, e in block]
        lambdas = [point.log_snr for point, _ in block]
        p1 = -math.expm1(-step)
        if len(block) == 1 or h == 0:
            return p1 * values[0]
        p2, r = 1 - p1 / step, (lambdas[-1] - lambdas[0]) / h
        last = (values[-1] - values[0]) / r
        if len(block) == 2:
            return p1 * values[0] + (p1 / 2 if self.kind == "midpoint" else p2) * last
        if self.kind == "midpoint":
            return p1 * values[0] + p2 * last
        r1, p3 = (lambdas[1] - lambdas[0]) / h, (p1 - step) / step**2 + 0.5
        first = (values[1] - values[0]) / r1
        d1, d2 = (r * first - r1 * last) / (r - r1), 2 * (last - first) / (r - r1)
        return p1 * values[0] + p2 * d1 + p3 * d2

    def evaluations(self, grid: Grid) -> int:
        """Return the number of steps: one evaluation per step."""
        return grid.steps
