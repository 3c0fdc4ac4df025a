"""A scheduler holds nothing of a request: objects are frozen, and interleaved requests do not influence each other."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from schedulers.build import build
from schedulers.grid import Grid
from schedulers.settings import NoiseSchedulerSettings
from schedulers.solvers.base import Denoise, Noise, Solver, SolverState
from schedulers.solvers.euler import DDIM, Euler
from schedulers.solvers.heun import Heun


@dataclasses.dataclass(frozen=True)
class TwoStep:
    """A multistep solver that needs state: x0 is extrapolated from the step before."""

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Extrapolate x0 from the step before, and step with it."""
        there, now = grid[i + 1], denoise(x, grid[i])
        x0 = now.x0 if not state.history else 1.5 * now.x0 - 0.5 * state.history[-1][1].x0
        state.history.append((grid[i], now))
        return there.alpha * x0 + there.sigma * now.eps

    def evaluations(self, grid: Grid) -> int:
        """Return one evaluation for each step."""
        return grid.steps


@pytest.mark.parametrize("solver", [Euler(), DDIM(0.5), Heun(), TwoStep()], ids=str)
@pytest.mark.parametrize("family", ["rectified_flow", "ddpm", "sgm"])
def test_interleaved_requests_are_the_requests_alone(solver: Solver, family: str, gaussian: Any) -> None:
    scheduler = dataclasses.replace(build(NoiseSchedulerSettings(family)), solver=solver)
    starts = [torch.linspace(-1, 1, 5), torch.linspace(2, -3, 5)]

    def noise(seed: int) -> Callable[[int], Tensor]:
        return lambda i: torch.randn(5, generator=torch.Generator().manual_seed(1000 * seed + i))

    grids = [scheduler.grid(6), scheduler.grid(9)]
    states = [scheduler.init_noise(x, grid) for x, grid in zip(starts, grids, strict=True)]
    alone = [scheduler.sample(states[r], grids[r], gaussian.denoise, noise(r)) for r in (0, 1)]
    memories, together = [SolverState(), SolverState()], list(states)
    for i in range(9):
        for r in (0, 1):
            if i < grids[r].steps:
                x = together[r]
                together[r] = scheduler.solver.step(x, i, grids[r], gaussian.denoise, memories[r], noise(r))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not torch.equal(*alone)


@pytest.mark.parametrize("family", ["rectified_flow", "ddpm", "sgm"])
def test_everything_is_frozen(family: str) -> None:
    scheduler = build(NoiseSchedulerSettings(family, solver="ddim", eta=0.5))
    parts: list[Any] = [
        scheduler,
        scheduler.path,
        scheduler.spacing,
        scheduler.prediction,
        scheduler.solver,
        scheduler.grid(3),
    ]
    for part in [*parts, scheduler.grid(3)[0]]:
        name = dataclasses.fields(part)[0].name if dataclasses.fields(part) else "anything"
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, 0)


def test_a_grid_does_not_follow_the_tensors_it_was_made_from() -> None:
    column = torch.tensor([1.0, 0.5], dtype=torch.float64)
    grid = Grid(column, 1 - column, column, column, column, 1.0)
    column[0] = 7.0
    assert grid[0].sigma == 1.0
    assert (len(grid), grid.steps) == (2, 1)


def test_the_state_is_float32_whatever_comes_in(gaussian: Any) -> None:
    scheduler = build(NoiseSchedulerSettings("rectified_flow"))
    grid, x = scheduler.grid(4), torch.ones(3, dtype=torch.bfloat16)
    assert scheduler.init_noise(x, grid).dtype == torch.float32
    assert scheduler.sample(x, grid, gaussian.denoise, torch.zeros).dtype == torch.float32
    assert scheduler.sample(x.double(), grid, gaussian.denoise, torch.zeros).dtype == torch.float64
