"""Order of convergence on an exact Gaussian in float64, for every deterministic solver on every path."""

import itertools
import math
from typing import Any

import pytest
import torch

from schedulers.build import build
from schedulers.compatibility import resolve, starts_at_pure_noise
from schedulers.settings import NoiseSchedulerSettings
from schedulers.solvers.base import SolverState
from schedulers.tables import SOLVERS, families

# Rows whose distance in log(sigma / alpha) shrinks everywhere as steps are added; the last step, to clean data, does
# not, and is left out.
SPACED = {
    "flow": NoiseSchedulerSettings("rectified_flow", sigma_first=0.8, sigma_last=0.2),
    "flow_shift_3": NoiseSchedulerSettings("rectified_flow", shift=3.0, sigma_first=0.9, sigma_last=0.02),
    "ddpm": NoiseSchedulerSettings("ddpm", spacing="karras"),
    "edm": NoiseSchedulerSettings("sgm"),
    "ve": NoiseSchedulerSettings("sgm", path="ve", spacing="karras"),
    "vp": NoiseSchedulerSettings("sgm", path="vp", t_last=0.05),
    "sub_vp": NoiseSchedulerSettings("sgm", path="sub_vp", t_last=0.1),
}
FEW = ("flow_shift_3", "ddpm", "edm")  # of the default suite
# Solver, its options, its order in theory, and how many starting values a multistep rule of that order needs.
ORDERS: list[tuple[str, dict[str, Any], float, int]] = [
    ("euler", {}, 1, 0),
    ("ddim", {}, 1, 0),
    ("heun", {}, 2, 0),
    ("dpm2", {}, 2, 0),
    ("dpmpp_1", {}, 1, 0),
    ("dpmpp_2m", {}, 2, 1),
    ("dpmpp_2m", {"kind": "heun"}, 2, 1),
    ("dpmpp_3m", {}, 3, 2),
    ("dpmpp_2s", {}, 2, 0),
    ("dpmpp_2s", {"kind": "heun"}, 2, 0),
    ("dpmpp_3s", {"kind": "heun"}, 3, 0),
    ("unipc", {"order": 1, "corrector": False}, 1, 0),
    ("unipc", {"order": 2, "corrector": False}, 2, 1),
    ("unipc", {"order": 3, "corrector": False}, 3, 2),
    ("unipc", {"order": 1}, 2, 1),
    ("unipc", {"order": 2}, 3, 2),
    ("unipc", {"order": 2, "b": "bh1"}, 3, 2),
    ("unipc", {"order": 3}, 4, 3),
    ("deis", {"order": 1}, 1, 0),
    ("deis", {"order": 2}, 2, 1),
    ("deis", {"order": 3}, 3, 2),
    ("lms", {"order": 1}, 1, 0),
    ("lms", {"order": 2}, 2, 1),
    ("lms", {"order": 3}, 3, 2),
    ("lms", {"order": 4}, 4, 3),
    ("pndm", {}, 2, 0),
    ("pndm", {"runge_kutta": True}, 2, 0),
]
DETERMINISTIC = {name for name, *_ in ORDERS} | {"rk45"}
STOCHASTIC = {"tcd", "ancestral", "ddpm", "dpmpp_2m_sde", "lcm", "edm_churn", "euler_maruyama", "predictor_corrector"}


def error(settings: NoiseSchedulerSettings, steps: int, exact: int, gaussian: Any) -> float:
    """Return the largest error before the step to clean data, with the first `exact` rows set to the solution."""
    scheduler, state, z = build(settings), SolverState(), torch.linspace(-2, 2, 9, dtype=torch.float64)
    grid = scheduler.grid(steps)
    x, last = gaussian.flow(z, grid[0]), grid.steps - 1
    for i in range(last):
        x = scheduler.step(x, i, grid, gaussian.denoise, state, torch.zeros)
        if i < exact:
            x, state.sample = gaussian.flow(z, grid[i + 1]), gaussian.flow(z, grid[i])
    return float((x - gaussian.flow(z, grid[last])).abs().max())


def test_every_solver_is_either_measured_here_or_stochastic() -> None:
    assert set(SOLVERS) == DETERMINISTIC | STOCHASTIC
    assert DETERMINISTIC.isdisjoint(STOCHASTIC)


@pytest.mark.parametrize("named", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in SPACED])
@pytest.mark.parametrize(("solver", "options", "order", "exact"), ORDERS, ids=lambda v: str(v))
def test_order(
    named: str,
    solver: str,
    options: dict[str, Any],
    order: float,
    exact: int,
    gaussian: Any,
    record_property: Any,
) -> None:
    """Multistep rules start from exact values, so that their order is measured and not that of their first step."""
    full = {"lower_order_final": False} if solver == "unipc" else {}  # it lowers the last steps of every grid
    settings = NoiseSchedulerSettings(**{**vars(SPACED[named]), "solver": solver, **options, **full})
    if solver == "pndm" and named not in ("ddpm", "vp", "sub_vp"):
        with pytest.raises(ValueError, match="solver=pndm cannot run"):
            build(settings)
        return
    fine = order > 2 or solver in ("dpmpp_2s", "deis")
    counts = (505, 1009) if fine else (253, 505)  # less the last step, whole blocks of two and three
    errors = [error(settings, steps, exact, gaussian) for steps in counts]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    record_property("slopes", slopes)
    assert slopes[-1] == pytest.approx(order, abs=0.15), slopes


def test_the_published_third_order_is_of_order_two(gaussian: Any) -> None:
    """The weight of the second difference is half, as in the authors' code and in diffusers."""
    from dataclasses import replace

    scheduler = build(NoiseSchedulerSettings("sgm", solver="dpmpp_3m"))
    published = replace(scheduler, solver=replace(scheduler.solver, halve_d2=True))  # type: ignore[type-var, call-arg]
    z, errors = torch.linspace(-2, 2, 9, dtype=torch.float64), []
    for steps in (128, 256):
        grid, state = published.grid(steps), SolverState()
        x = gaussian.flow(z, grid[0])
        for i in range(steps - 1):
            x = published.step(x, i, grid, gaussian.denoise, state, torch.zeros)
        errors.append(float((x - gaussian.flow(z, grid[steps - 1])).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("named", list(SPACED))
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_the_adaptive_solver_keeps_its_tolerance_and_counts_what_it_spends(
    named: str, tolerance: float, gaussian: Any
) -> None:
    settings = NoiseSchedulerSettings(**{**vars(SPACED[named]), "solver": "rk45", "rtol": tolerance, "atol": tolerance})
    scheduler, calls = build(settings), 0
    grid, z = scheduler.grid(2), torch.linspace(-2, 2, 9, dtype=torch.float64)

    def denoise(x: torch.Tensor, point: Any) -> Any:
        nonlocal calls
        calls += 1
        assert point.sigma > 0
        return gaussian.denoise(x, point)

    x = scheduler.step(gaussian.flow(z, grid[0]), 0, grid, denoise, SolverState(), torch.zeros)
    wanted = gaussian.flow(z, grid[1])
    assert float(((x - wanted).abs() / (1 + wanted.abs())).max()) < 20 * tolerance
    clean = scheduler.sample(gaussian.flow(z, grid[0]), grid, denoise, torch.zeros)
    least = scheduler.path.sigma(scheduler.path.t_min) / scheduler.path.alpha(scheduler.path.t_min)
    assert float((clean - gaussian.flow(z, grid[2])).abs().max()) < 20 * tolerance + 2 * max(least, 1e-3)
    assert scheduler.solver.evaluations(grid) is None
    assert 7 <= calls <= 2000


REFUSED = {
    "flow": ("pndm", "tcd", "edm_churn", "euler_maruyama"),
    "edm": ("pndm", "tcd"),
    "ve": ("pndm", "tcd"),
    "vp": ("tcd",),
    "sub_vp": ("tcd",),
}


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"rk45"}))
def test_evaluations_are_counted_as_they_happen(solver: str, steps: int, gaussian: Any) -> None:
    for family, paths in families().items():
        for path in paths:
            settings = NoiseSchedulerSettings(family, path=path, solver=solver)
            if solver in REFUSED.get(path, ()):
                with pytest.raises(ValueError, match=f"solver={solver} cannot"):
                    build(settings)
                continue
            scheduler = build(settings)
            calls: list[Any] = []
            grid = scheduler.grid(steps)

            def denoise(x: torch.Tensor, point: Any, calls: list[Any] = calls) -> Any:
                calls.append(point)
                return gaussian.denoise(x, point)

            noise = torch.ones(1, 3)
            scheduler.sample(noise, grid, denoise, lambda i, noise=noise: noise)  # type: ignore[misc]
            assert len(calls) == scheduler.solver.evaluations(grid), path
            assert min(point.sigma for point in calls) > 0
            assert starts_at_pure_noise(scheduler_settings := resolve(settings)) == (calls[0].alpha == 0)
            assert scheduler_settings.path == path


def test_a_noisy_end_costs_heun_the_second_evaluation() -> None:
    noisy = build(NoiseSchedulerSettings("ddpm", solver="heun", end="t_min"))
    assert noisy.solver.evaluations(noisy.grid(6)) == 12
