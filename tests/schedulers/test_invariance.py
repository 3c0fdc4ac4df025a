"""The same sample in VP, VE and flow coordinates on one grid of sigma / alpha, except with Heun."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from schedulers import paths
from schedulers.grid import Point
from schedulers.prediction import Estimate
from schedulers.solvers.base import Memory, Solver
from schedulers.solvers.euler import DDIM, Euler
from schedulers.solvers.heun import Heun
from schedulers.spacing import grid_at

VP = paths.DiscreteVPPath(paths.betas("scaled_linear", 0.00085, 0.012))
PATHS: list[paths.NoisePath] = [VP, paths.VECoordinates(VP), paths.EDMPath(), paths.FlowPath()]


def samples(solver: Solver, noise: Callable[[int], Tensor]) -> list[Tensor]:
    """One sample a path, from one start and one denoiser that sees only x / alpha and sigma / alpha."""

    def denoise(x: Tensor, point: Point) -> Estimate:
        ratio = point.sigma / point.alpha
        y = x / point.alpha
        eps = torch.tanh(y / (1 + ratio**2) ** 0.5 + 0.3 * ratio / (1 + ratio))
        return Estimate(y - ratio * eps, eps)

    results = []
    ratios = torch.logspace(1, -1, 12, dtype=torch.float64)
    for path in PATHS:
        grid = grid_at(path, path.t_of(ratios))
        torch.testing.assert_close(grid.sigma[:-1] / grid.alpha[:-1], ratios, rtol=1e-12, atol=0)
        x = grid[0].alpha * (10 * noise(99).double())
        for i in range(grid.steps):
            x = solver.step(x, i, grid, denoise, Memory(), lambda i: noise(i).double())
        results.append(x)
    return results


@pytest.mark.parametrize("solver", [Euler(), DDIM(0.0), DDIM(0.6), DDIM(1.0)])
def test_coordinates_do_not_matter(solver: Solver, noise: Callable[[int], Tensor]) -> None:
    first, *others = samples(solver, noise)
    for other in others:
        assert ((other - first).abs().max() / first.abs().max()).item() < 1e-13


def test_heun_depends_on_coordinates(noise: Callable[[int], Tensor]) -> None:
    vp, ve, edm, flow = samples(Heun(), noise)
    torch.testing.assert_close(ve, edm, rtol=1e-11, atol=1e-11)
    assert (vp - ve).abs().max() > 1e-4
    assert (flow - ve).abs().max() > 1e-4
