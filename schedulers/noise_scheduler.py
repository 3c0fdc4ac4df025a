"""One frozen object that holds everything sampling needs; requests can share it."""

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
    """A family (path, prediction, spacing) together with a solver. It holds no state of a request.

    Attributes:
        path: The noise path of the family.
        spacing: The rule that chooses the points for a number of steps.
        prediction: The meaning of the network's output.
        solver: The rule for one step.
        state_dtype: The dtype that the state is rounded to after each step, as diffusers rounds it to the model's
            dtype. None keeps the state in float32.
    """

    path: NoisePath
    spacing: Spacing
    prediction: Prediction
    solver: Solver
    state_dtype: torch.dtype | None = None

    def grid(self, steps: int, tokens: int | None = None) -> Grid:
        """Return the table of steps + 1 points.

        Args:
            steps: The number of solver steps.
            tokens: The number of latent tokens of one sample. Only a resolution-dependent shift uses it.

        Returns:
            The grid, noise first.

        Raises:
            ValueError: The path has no grid with that many steps, or the spacing needs tokens and gets none.
        """
        spacing = self.spacing if tokens is None else for_tokens(self.spacing, tokens)
        return spacing.grid(self.path, steps)

    def init_noise(self, noise: Tensor, grid: Grid) -> Tensor:
        """Return the state at grid[0], made from standard normal noise, in float32 (float64 input stays float64)."""
        return grid.init_std * at_least_float32(noise)

    def timesteps(self, steps: int, tokens: int | None = None) -> Tensor:
        """Return the timestep (tau) that each step passes to the network: float64 of shape (steps,)."""
        return self.grid(steps, tokens).tau[:-1]

    def sigmas(self, steps: int, tokens: int | None = None) -> Tensor:
        """Return sigma at each point, the last row included: float64 of shape (steps + 1,)."""
        return self.grid(steps, tokens).sigma

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Return the state at grid[i + 1], given the state x at grid[i]."""
        x_next = self.solver.step(x, i, grid, denoise, state, noise)
        return x_next if self.state_dtype is None else x_next.to(self.state_dtype).to(x.dtype)

    def sample(self, x: Tensor, grid: Grid, denoise: Denoise, noise: Noise, state: SolverState | None = None) -> Tensor:
        """Run all steps, from x at grid[0] to the last row.

        Args:
            x: The state at grid[0], of any shape. It becomes float32 whatever the network's dtype; float64 stays
                float64.
            grid: The points, from `grid`.
            denoise: The network as a function of state and point.
            noise: The source of standard normal noise.
            state: What the solver stores between steps; a new one by default.

        Returns:
            The state at the last row, shaped like x.
        """
        x, state = at_least_float32(x), SolverState() if state is None else state
        for i in range(grid.steps):
            x = self.step(x, i, grid, denoise, state, noise)
        return x


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)
