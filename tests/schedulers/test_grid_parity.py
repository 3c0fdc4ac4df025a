"""Grids equal diffusers' own, both built independently from the published parameters."""

from typing import Any

import diffusers
import pytest
import torch

from schedulers import paths, spacing
from schedulers.build import build
from schedulers.settings import NoiseSchedulerSettings

published: Any = diffusers  # its mix-ins hide their attributes from type checkers
SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
close = torch.testing.assert_close


@pytest.mark.parametrize("steps", [1, 4, 10, 28])
def test_flow_linspace_is_diffusers_at_shift_1(steps: int) -> None:
    theirs = published.FlowMatchEulerDiscreteScheduler(shift=1.0)
    theirs.set_timesteps(steps)
    ours = build(NoiseSchedulerSettings("rectified_flow", sigma_last=0.001))
    close(ours.sigmas(steps).float(), theirs.sigmas, rtol=1e-6, atol=1e-7)
    close(ours.timesteps(steps).float(), theirs.timesteps, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("steps", [4, 28])
def test_even_flow_with_shift_is_flux_handing_in_its_sigmas(steps: int) -> None:
    theirs = published.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    ours = build(NoiseSchedulerSettings("rectified_flow", shift=3.0))
    close(ours.sigmas(steps).float(), theirs.sigmas, rtol=1e-6, atol=1e-7)


def test_static_shift_is_applied_once_and_diffusers_twice_is_a_setting() -> None:
    theirs = published.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(10)
    once = build(NoiseSchedulerSettings("rectified_flow", shift=3.0, sigma_last=0.001)).sigmas(10)
    twice = build(NoiseSchedulerSettings("rectified_flow", shift=3.0, sigma_last=0.003 / 1.002)).sigmas(10)
    assert once[-2].item() == pytest.approx(0.00299, abs=5e-6)
    assert theirs.sigmas[-2].item() == pytest.approx(0.00893, abs=5e-6)
    close(twice.float(), theirs.sigmas, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["leading", "trailing", "linspace"])
def test_discrete_timesteps_are_ddims_for_every_number_of_steps(kind: str) -> None:
    theirs = published.DDIMScheduler(timestep_spacing=kind)
    path = paths.DiscreteVPPath(paths.betas("linear"))
    cuts: dict[str, spacing.Spacing] = {
        "leading": spacing.Leading(),
        "trailing": spacing.Trailing(),
        "linspace": spacing.Linspace(integer=True),
    }
    for steps in [*range(2, 120), 250, 333, 500, 999, 1000]:
        theirs.set_timesteps(steps)
        wanted = theirs.timesteps[:steps]  # numpy's arange adds a row for some counts
        assert torch.equal(cuts[kind].grid(path, steps).tau[:-1].long(), wanted), steps


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos"])
def test_trained_alphas_are_ddims(schedule: paths.BetaSchedule) -> None:
    named = "squaredcos_cap_v2" if schedule == "squaredcos" else schedule
    theirs = published.DDIMScheduler(beta_schedule=named, beta_start=0.00085, beta_end=0.012)
    path = paths.DiscreteVPPath(paths.betas(schedule, 0.00085, 0.012))
    t = torch.arange(1000)
    close(
        path.alpha(t) ** 2, theirs.alphas_cumprod, rtol=2e-4, atol=1e-9
    )  # theirs is a float32 product of 1000 factors
    close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones(1000))
    exact = torch.cumprod(1 - path.betas, 0)
    close(path.alpha(t.double()) ** 2, exact, rtol=1e-12, atol=0)
    close(path.sigma(t.double()) ** 2, 1 - exact, rtol=1e-11, atol=0)


def test_the_last_row_of_a_discrete_grid_follows_set_alpha_to_one() -> None:
    clean = build(NoiseSchedulerSettings("ddpm", steps_offset=1)).grid(10)
    noisy = build(NoiseSchedulerSettings("ddpm", steps_offset=1, end="t_min")).grid(10)
    for grid, to_one in [(clean, True), (noisy, False)]:
        theirs = published.DDIMScheduler(steps_offset=1, set_alpha_to_one=to_one)
        assert grid[10].alpha ** 2 == pytest.approx(theirs.final_alpha_cumprod.item(), rel=1e-6)
    assert (clean[10].sigma, clean[0].tau, clean[9].tau) == (0.0, 901.0, 1.0)


@pytest.mark.parametrize("kind", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [7, 20, 50])
def test_euler_discrete_sigmas_in_ve_coordinates(kind: str, steps: int) -> None:
    theirs = published.EulerDiscreteScheduler(timestep_spacing=kind, **SD)
    theirs.set_timesteps(steps)
    cuts: dict[str, spacing.Spacing] = {
        "leading": spacing.Leading(),
        "trailing": spacing.Trailing(),
        "linspace": spacing.Linspace(),
    }
    betas = paths.betas("scaled_linear", 0.00085, 0.012)
    grid = cuts[kind].grid(paths.VECoordinates(paths.DiscreteVPPath(betas, interpolation="linear")), steps)
    close(grid.sigma.float(), theirs.sigmas, rtol=1e-5, atol=1e-6)
    close(grid.tau[:-1].float(), theirs.timesteps, rtol=1e-6, atol=1e-4)
    close(grid.c_in[:-1], (grid.sigma[:-1] ** 2 + 1).rsqrt())
    if kind == "leading":
        assert grid.init_std == pytest.approx(theirs.init_noise_sigma.item(), rel=1e-5)


@pytest.mark.parametrize("steps", [7, 20, 50])
def test_euler_discrete_karras(steps: int) -> None:
    theirs = published.EulerDiscreteScheduler(use_karras_sigmas=True, **SD)
    theirs.set_timesteps(steps)
    ours = build(NoiseSchedulerSettings("ddpm", spacing="karras", coordinates="ve", **SD))
    close(ours.sigmas(steps).float(), theirs.sigmas, rtol=1e-5, atol=1e-6)
    close(ours.timesteps(steps).float(), theirs.timesteps, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("steps", [1, 7, 18, 40])
def test_edm_karras(steps: int) -> None:
    theirs = published.EDMEulerScheduler()
    theirs.set_timesteps(steps)
    ours = build(NoiseSchedulerSettings("sgm"))
    close(ours.sigmas(steps).float(), theirs.sigmas, rtol=1e-6, atol=0)
    close(ours.timesteps(steps).float(), theirs.timesteps, rtol=1e-6, atol=1e-6)
    c_in = torch.stack([theirs._get_conditioning_c_in(s) for s in theirs.sigmas])
    close(ours.grid(steps).c_in.float(), c_in, rtol=1e-6, atol=0)


def test_the_last_noisy_row_of_a_wrong_order_is_refused() -> None:
    t = torch.tensor([0.2, 0.5])
    with pytest.raises(ValueError, match="must not rise"):
        spacing.grid_at(paths.FlowPath(), t)


@pytest.mark.parametrize("family", ["rectified_flow", "ddpm", "sgm"])
def test_a_clean_end_is_the_data_itself(family: str) -> None:
    last = build(NoiseSchedulerSettings(family)).grid(5)[5]
    assert (last.t, last.alpha, last.sigma) == (0.0, 1.0, 0.0)
    assert build(NoiseSchedulerSettings("sgm", tau_map="flow_time", end="t_min")).grid(5)[5].sigma == 0.002
