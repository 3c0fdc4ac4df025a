"""Order of convergence on an exact Gaussian in float64, for every family on its own spacing and down to clean data."""

import itertools
import math
from typing import Any

import pytest
import torch

from schedulers.build import build
from schedulers.families import Settings
from schedulers.solvers.base import Memory

SCHEDULERS = {
    "rectified_flow": Settings("rectified_flow"),
    "rectified_flow_shift_3": Settings("rectified_flow", shift=3.0),
    "ddpm": Settings("ddpm", spacing="karras"),
    "ddpm_ve": Settings("ddpm", spacing="karras", coordinates="ve"),
    "sgm": Settings("sgm"),
}


@pytest.mark.parametrize("named", list(SCHEDULERS))
@pytest.mark.parametrize(("solver", "order"), [("euler", 1.0), ("heun", 2.0)])
def test_order(named: str, solver: str, order: float, gaussian: Any, record_property: Any) -> None:
    settings = Settings(**{**vars(SCHEDULERS[named]), "solver": solver})
    scheduler, z = build(settings), torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = []
    for steps in (64, 128, 256, 512):
        grid = scheduler.grid(steps)
        # The last step, from the smallest trained sigma to 0, does not shrink with the others; stop before it.
        last = grid.steps if settings.family == "rectified_flow" else grid.steps - 1
        x = gaussian.flow(z, grid[0])
        for i in range(last):
            x = scheduler.solver.step(x, i, grid, gaussian.denoise, Memory(), torch.zeros)
        errors.append((x - gaussian.flow(z, grid[last])).abs().max().item())
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    record_property("slopes", slopes)
    assert slopes[-1] == pytest.approx(order, abs=0.15), slopes


@pytest.mark.parametrize("steps", [1, 6])
def test_evaluations_are_counted_as_they_happen(steps: int, gaussian: Any) -> None:
    for settings in [
        Settings(f, solver=s) for f in ("rectified_flow", "ddpm", "sgm") for s in ("euler", "ddim", "heun")
    ]:
        calls: list[Any] = []
        scheduler = build(settings)
        grid = scheduler.grid(steps)

        def denoise(x: torch.Tensor, point: Any, calls: list[Any] = calls) -> Any:
            calls.append(point)
            return gaussian.denoise(x, point)

        scheduler.sample(torch.zeros(3), grid, denoise, torch.zeros)
        assert len(calls) == scheduler.solver.evaluations(grid)
        assert min(point.sigma for point in calls) > 0
    noisy = build(Settings("ddpm", solver="heun", end="t_min"))
    assert noisy.solver.evaluations(noisy.grid(6)) == 12
