"""The whole recipe for sampling in one frozen object, safe to share between requests."""

from dataclasses import dataclass

import torch
from torch import Tensor

from schedulers.conventions import for_tokens
from schedulers.grid import Grid
from schedulers.paths import NoisePath
from schedulers.prediction import Prediction
from schedulers.solvers.base import Denoise, Noise, Solver, SolverState
from schedulers.spacing import Spacing


@dataclass(frozen=True)
class NoiseScheduler:
    """A family (path, prediction, spacing) with a solver. It holds no state of a request.

    rounded: the state is rounded to this dtype after each step, as diffusers rounds it to the model's; None keeps it in
    float32.
    """

    path: NoisePath
    spacing: Spacing
    prediction: Prediction
    solver: Solver
    state_dtype: torch.dtype | None = None

    def grid(self, steps: int, tokens: int | None = None) -> Grid:
        """The table of steps + 1 points; `tokens`, of one picture, matters only to a resolution-dependent shift.

        Raises ValueError when the path cannot be cut into that many steps, or tokens are needed and not given.
        """
        spacing = self.spacing if tokens is None else for_tokens(self.spacing, tokens)
        return spacing.grid(self.path, steps)

    def init_noise(self, noise: Tensor, grid: Grid) -> Tensor:
        """The state at grid[0] from standard normal noise, float32 (float64 stays)."""
        return grid.init_std * at_least_float32(noise)

    def timesteps(self, steps: int, tokens: int | None = None) -> Tensor:
        """What the network is told at each step: float64 of shape (steps,)."""
        return self.grid(steps, tokens).tau[:-1]

    def sigmas(self, steps: int, tokens: int | None = None) -> Tensor:
        """sigma at each point, the last row included: float64 of shape (steps + 1,)."""
        return self.grid(steps, tokens).sigma

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """The state at grid[i + 1] from the state x at grid[i]."""
        x_next = self.solver.step(x, i, grid, denoise, state, noise)
        return x_next if self.state_dtype is None else x_next.to(self.state_dtype).to(x.dtype)

    def sample(self, x: Tensor, grid: Grid, denoise: Denoise, noise: Noise, state: SolverState | None = None) -> Tensor:
        """Walk x from grid[0] to the last row. The state is float32 whatever the network's dtype (float64 stays)."""
        x, state = at_least_float32(x), SolverState() if state is None else state
        for i in range(grid.steps):
            x = self.step(x, i, grid, denoise, state, noise)
        return x


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)
