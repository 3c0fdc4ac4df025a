"""The same sample in VP, VE and flow coordinates on one grid of sigma / alpha, except where a method says otherwise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from schedulers import paths
from schedulers.grid import Point
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.prediction import Eps, Estimate
from schedulers.solvers.adams import DEIS, LMS, PNDM
from schedulers.solvers.base import Solver, SolverState
from schedulers.solvers.dpm import DPMSolver
from schedulers.solvers.euler import DDIM, Euler
from schedulers.solvers.heun import DPM2, Heun
from schedulers.solvers.lcm import LCM
from schedulers.solvers.posterior import DDPM
from schedulers.solvers.rk45 import RK45
from schedulers.solvers.sde import EDMChurn, EulerMaruyama, PredictorCorrector
from schedulers.solvers.unipc import UniPC
from schedulers.spacing import Custom, grid_at

VP = paths.DiscreteVPPath(paths.betas("scaled_linear", 0.00085, 0.012))
PATHS: list[paths.NoisePath] = [
    VP,
    paths.VECoordinates(VP),
    paths.EDMPath(),
    paths.FlowPath(),
    paths.ContinuousVPPath(),
    paths.ContinuousVPPath(sub=True),
    paths.GeometricVEPath(),
]


def samples(solver: Solver, noise: Callable[[int], Tensor], last: int = 12) -> list[Tensor]:
    """Return one sample for each path, from one start and one denoiser that sees only x / alpha and sigma / alpha."""

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
        x, state = grid[0].alpha * (10 * noise(99).double()), SolverState()
        for i in range(min(grid.steps, last)):
            x = solver.step(x, i, grid, denoise, state, lambda i: noise(i).double())
        results.append(x / grid[min(grid.steps, last)].alpha)
    return results


@pytest.mark.parametrize(
    "solver",
    [
        Euler(),
        DDIM(0.0),
        DDIM(0.6),
        DDIM(1.0),
        DDPM("small"),
        DPM2(),
        DPM2(0.7),
        DPMSolver(1),
        DPMSolver(2),
        DPMSolver(2, "heun"),
        DPMSolver(3),
        DPMSolver(2, stochastic=True),
        DPMSolver(2, "heun", stochastic=True),
        UniPC(1),
        UniPC(2),
        UniPC(3),
        UniPC(3, "bh1"),
        DEIS(1),
        DEIS(2),
        DEIS(3),
        LMS(2),
        LMS(4),
        PNDM(),
        LCM(boundary=False),
        EDMChurn(s_churn=5.0),
        EDMChurn(s_churn=5.0, heun=False),
        PredictorCorrector(predictor=DDPM("small")),
    ],
    ids=str,
)
def test_coordinates_do_not_matter(solver: Solver, noise: Callable[[int], Tensor]) -> None:
    first, *others = samples(solver, noise)
    for path, other in zip(PATHS[1:], others, strict=True):
        assert ((other - first).abs().max() / first.abs().max()).item() < 1e-12, path


@pytest.mark.parametrize("form", [DPMSolver(3, form="noise"), UniPC(3, form="noise")], ids=str)
def test_coordinates_do_not_matter_in_the_noise_form_either(form: Solver, noise: Callable[[int], Tensor]) -> None:
    first, *others = samples(form, noise, last=11)
    for path, other in zip(PATHS[1:], others, strict=True):
        assert ((other - first).abs().max() / first.abs().max()).item() < 1e-12, path
    with pytest.raises(ValueError, match="end=t_min"):
        samples(form, noise)


def test_coordinates_do_not_matter_to_the_adaptive_solver(noise: Callable[[int], Tensor]) -> None:
    """This holds down to the last noisy row: the end of the last jump belongs to the path."""
    first, *others = samples(RK45(), noise, last=11)
    for path, other in zip(PATHS[1:], others, strict=True):
        assert ((other - first).abs().max() / first.abs().max()).item() < 1e-12, path


@pytest.mark.parametrize("solver", [Heun(), EulerMaruyama(), DDPM("large")], ids=str)
def test_some_methods_depend_on_coordinates(solver: Solver, noise: Callable[[int], Tensor]) -> None:
    vp, ve, edm, flow, *_ = samples(solver, noise)
    assert (vp - ve).abs().max() > 1e-4
    assert (flow - ve).abs().max() > 1e-4
    if not isinstance(solver, EulerMaruyama):  # it depends on how time runs, too
        torch.testing.assert_close(ve, edm, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "solver",
    [DPMSolver(2), DPMSolver(3), DPMSolver(2, "heun"), UniPC(2, corrector=False), DEIS(2), DEIS(3), LMS(4)],
    ids=str,
)
def test_a_repeated_row_changes_nothing(solver: Solver, gaussian: Any) -> None:
    """A grid with as many steps as trained timesteps has one row twice; UniC evaluates the second one corrected."""
    once = torch.linspace(999, 0, 18, dtype=torch.float64)
    twice = torch.cat([once[:6], once[5:]])
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    results = []
    for t in (once, twice):
        scheduler = NoiseScheduler(VP, Custom((1.0,)), Eps(), solver)
        results.append(scheduler.sample(x, grid_at(VP, t), gaussian.denoise, torch.zeros))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)
