"""Values that do not agree with one another are refused as settings are resolved, with what to change."""

import dataclasses
import math
import warnings
from typing import Any

import pytest
import torch

from schedulers import NoiseSchedulerSettings, paths, resolve
from schedulers.build import build
from schedulers.limits import MAX_ORDERS, betas, check_tokens, largest_sigma
from schedulers.tables import PATHS, families

FLOW, DDPM = {"family": "rectified_flow"}, {"family": "ddpm"}
KARRAS = {"family": "ddpm", "spacing": "karras"}
EDM, VE, VP, SUB_VP = ({"family": "sgm", "path": path} for path in ("edm", "ve", "vp", "sub_vp"))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {**FLOW, "solver": "unipc", "order": 4},
            "order=4, but solver=unipc has orders 1 to 3; use one of these",
        ),
        ({**FLOW, "solver": "deis", "order": 4}, "order=4, but solver=deis has orders 1 to 3; use one of these"),
        (
            {**EDM, "solver": "edm_churn", "s_tmin": 60.0},
            "s_tmin=60 is above s_tmax=50; lower s_tmin, or raise s_tmax",
        ),
        (
            {**DDPM, "threshold": 0.995, "clip": 0.5},
            "clip=0.5 with threshold=0.995 is the largest quantile, which is 1 or more; raise clip, or drop threshold",
        ),
        ({**VP, "beta_min": 5.0, "beta_max": 5.0}, "beta_min=5 is not below beta_max=5; lower beta_min, or raise"),
        (
            {**DDPM, "beta_start": 0.5},
            "beta_start=0.5 is above beta_end=0.02; lower beta_start, or raise beta_end",
        ),
        ({**DDPM, "beta_end": 0.5}, "1000 betas up to beta_end=0.5 leave alpha="),
        ({**DDPM, "train_steps": 10_000}, "10000 betas up to beta_end=0.02 leave alpha="),
        ({**EDM, "sigma_min": 80.0}, "sigma_min=80 is not below sigma_max=80; lower sigma_min, or raise sigma_max"),
        ({**VE, "sigma_max": 0.01}, "sigma_min=0.01 is not below sigma_max=0.01"),
        ({**FLOW, "spacing": "karras", "sigma_max": 2.0}, "sigma_max=2, but path=flow ends at 1; give that or less"),
        ({**FLOW, "spacing": "beta", "sigma_max": 0.0005}, "sigma_min=0.001 is not below sigma_max=0.0005"),
        ({**KARRAS, "sigma_max": 200.0}, "sigma_max=200, but path=discrete_vp ends at 157.4"),
        ({**KARRAS, "sigma_min": 1e-4}, "sigma_min=0.0001, but path=discrete_vp begins at 0.01"),
        ({**VP, "spacing": "exponential", "sigma_max": 1e4}, "sigma_max=10000, but path=vp ends at 152.1"),
        ({**SUB_VP, "spacing": "karras", "sigma_max": 1e4}, "sigma_max=10000, but path=sub_vp ends at 152.1"),
        (
            {**EDM, "spacing": "custom", "sigmas": [1.0, 2.0]},
            "sigmas=[1.0, 2.0] do not fall from 1 to 2; give falling numbers",
        ),
        ({**EDM, "spacing": "custom", "sigmas": [2.0, 2.0]}, "sigmas=[2.0, 2.0] do not fall from 2 to 2"),
        ({**FLOW, "spacing": "custom", "sigmas": [1.5, 0.5]}, "sigmas begin at 1.5, but path=flow ends at 1"),
        ({**DDPM, "spacing": "custom", "sigmas": [2.0, 1e-3]}, "sigmas end at 0.001, but path=discrete_vp begins at"),
        ({**FLOW, "sigma_last": 0.7, "sigma_first": 0.5}, "sigma_last=0.7 is not below sigma_first=0.5; lower"),
        ({**FLOW, "sigma_last": 0.5, "sigma_first": 0.5}, "sigma_last=0.5 is not below sigma_first=0.5"),
        (
            {**FLOW, "sigma_last": 0.0},
            "sigma_last=0 evaluates the network at sigma = 0; raise it, or set spare_row=true",
        ),
        (
            {**FLOW, "base_shift": 0.5, "max_shift": 1.15, "base_tokens": 4096},
            "base_tokens=4096 is not below max_tokens=4096; lower base_tokens, or raise max_tokens",
        ),
        ({**FLOW, "sigma_cap": 0.8}, "sigma_cap=0.8 is not above the second of 5 sigmas, 0.8, so that rows would be"),
        (
            {**DDPM, "spacing": "lcm", "original_steps": 2000},
            "original_steps=2000 of a path of 1000 trained timesteps; use original_steps=1000 or less",
        ),
        (
            {**DDPM, "spacing": "lcm", "original_steps": 4},
            "steps=5 of a model distilled on original_steps=4; use that number or fewer",
        ),
        ({**DDPM, "train_steps": 5, "spare_row": True}, "steps=5 with spacing=leading on a path of 5 trained"),
        (
            {**DDPM, "steps_offset": 300},
            "steps=5 with spacing=leading on a path of 1000 trained timesteps and steps_offset=300; use 3 or fewer",
        ),
        ({**DDPM, "steps_offset": -1}, "steps=5 with spacing=leading on a path of 1000 trained timesteps and"),
        (
            {**VP, "end": "t_min", "t_last": 1e-3},
            "end=t_min ends path=vp at 0.001, and the last evaluation is there or beyond; raise t_last, or use",
        ),
        (
            {**EDM, "end": "t_min", "spacing": "custom", "sigmas": [1.0, 0.001]},
            "end=t_min ends path=edm at 0.002, and the last evaluation is there or beyond; raise the last of sigmas",
        ),
        (
            {**VE, "end": "t_min", "spacing": "exponential"},
            "end=t_min ends path=ve at 0.01, and the last evaluation is there or beyond; raise sigma_min, or use",
        ),
        ({**VE, "end": "t_min"}, "end=t_min is above the last of geometric sigmas; use end=clean, or"),
        ({**VP, "geometric_sigma": True}, "geometric_sigma=true evaluates the network at t = 0, where path=vp has"),
        (
            {**VE, "sigma_max": 1e5, "state_dtype": "float16"},
            "state_dtype=float16 holds no state at sigma 100000; use state_dtype=bfloat16, or a sigma_max of 10000",
        ),
    ],
)  # fmt: skip
def test_values_that_do_not_agree_are_refused_with_what_to_change(values: dict[str, Any], line: str) -> None:
    steps = 2 if values.get("spacing") == "custom" else 5
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        resolve(NoiseSchedulerSettings(**values), steps)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    "values",
    [
        {**FLOW, "solver": "lms", "order": 4},
        {**EDM, "solver": "edm_churn", "s_tmin": 1.0, "s_tmax": 1.0},
        {**EDM, "solver": "edm_churn", "s_tmax": math.inf},
        {**DDPM, "beta_start": 0.01, "beta_end": 0.01},
        {**DDPM, "train_steps": 2, "spacing": "karras"},
        {**KARRAS, "sigma_min": 0.0101, "sigma_max": 157.4},
        {**KARRAS, "prediction": "v", "zero_terminal_snr": True, "sigma_max": 500.0},
        {**EDM, "spacing": "custom", "sigmas": [700.0, 10.0, 1.0, 0.1, 0.01]},
        {**FLOW, "sigma_last": 0.0, "spare_row": True},
        {**EDM, "end": "t_min", "spacing": "custom", "sigmas": [1.0, 0.003]},
        {**VE, "end": "t_min", "geometric_sigma": False, "t_last": 0.01},
        {**VP, "end": "t_min", "spacing": "karras", "sigma_min": 0.02},
        {**FLOW, "sigma_cap": 0.81, "shift": 1.0},
        {**FLOW, "shift_terminal": 0.02, "mu": 7.0},
        {**DDPM, "steps_offset": 199},
        {**DDPM, "steps_offset": -166, "spare_row": True},
        {**VE, "sigma_max": 1e4, "state_dtype": "float16"},
    ],
)
def test_values_at_the_edge_give_a_grid_that_falls_and_a_finite_sample(values: dict[str, Any], gaussian: Any) -> None:
    settings = NoiseSchedulerSettings(**values)
    steps = 2 if settings.train_steps == 2 else len(settings.sigmas or range(5))
    resolve(settings, steps)
    scheduler = build(settings)
    grid = scheduler.grid(steps)
    assert all(grid[i].ratio > grid[i + 1].ratio for i in range(steps))
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    x = scheduler.sample(scheduler.init_noise(noise, grid), grid, gaussian.denoise, lambda i: noise)
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos"])
@pytest.mark.parametrize("n", [2, 100, 1000])
def test_the_betas_are_those_of_the_path(schedule: Any, n: int) -> None:
    settings = NoiseSchedulerSettings("ddpm", beta_schedule=schedule, train_steps=n)
    torch.testing.assert_close(
        torch.tensor(betas(settings), dtype=torch.float64), paths.betas(schedule, steps=n), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("values", [EDM, VE, {**DDPM, "coordinates": "ve"}, {**VP}, {**FLOW}])
def test_the_largest_sigma_is_that_of_the_first_row(values: dict[str, Any]) -> None:
    settings = resolve(NoiseSchedulerSettings(**values, solver="euler"))
    path = build(settings).path
    assert largest_sigma(settings) == pytest.approx(path.sigma(path.t_max), rel=1e-4)


def test_orders_are_those_of_the_solvers() -> None:
    for solver, highest in MAX_ORDERS.items():
        build(NoiseSchedulerSettings("ddpm", solver=solver, order=highest))
        with pytest.raises(ValueError, match=rf"orders 1 to {highest}"):
            resolve(NoiseSchedulerSettings("ddpm", solver=solver, order=highest + 1))


def test_an_image_too_large_for_a_shift_that_grows() -> None:
    settings = resolve(NoiseSchedulerSettings("rectified_flow", base_shift=0.5, max_shift=1.15))
    check_tokens(settings, 4096)
    with pytest.raises(ValueError, match=r"give mu=17\.4 for an image of 100000 tokens; it may be -7 to 7"):
        check_tokens(settings, 100_000)


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_the_last_level_is_sigma_min_whatever_it_is(spacing: str) -> None:
    for sigma_min in (0.002, 0.003, 0.0123, 0.1, 0.7):
        grid = build(NoiseSchedulerSettings("sgm", spacing=spacing, sigma_min=sigma_min, end="t_min")).grid(5)
        assert grid.sigma[-2] == grid.sigma[-1] == sigma_min


UNUSED: dict[str, Any] = {
    "end": "t_min",
    "steps_offset": 3,
    "shift": 3.0,
    "sigma_min": 0.05,
    "sigma_max": 0.9,
    "learned_variance": None,
    "train_steps": 500,
    "beta_schedule": "scaled_linear",
    "beta_min": 0.2,
    "sigma_data": 0.7,
    "tau_map": "sigma",
    "edm_sign": -1,
    "coordinates": "ve",
    "integer_timesteps": False,
    "spare_row": True,
    "stride_target": True,
    "round_tau": "floor",
    "rho": 3.0,
    "t_last": 0.1,
    "geometric_sigma": False,
    "original_steps": 40,
    "sigma_last": 0.01,
    "sigma_first": 0.9,
    "sigma_cap": 0.9,
    "shift_terminal": 0.02,
    "eta": 0.5,
    "variance": "large",
    "final_noise": True,
    "kind": "heun",
    "order": 3,
    "b": "bh1",
    "corrector": False,
    "lower_order_final": False,
    "runge_kutta": True,
    "boundary": True,
    "timestep_scaling": 5.0,
    "gamma": 0.5,
    "s_churn": 10.0,
    "corrections": 2,
    "rtol": 0.1,
}


@pytest.mark.parametrize("path", PATHS)
def test_an_option_that_is_said_to_have_no_effect_has_none(path: str, gaussian: Any) -> None:
    family = next(family for family, own in families().items() if path in own)
    for spacing in PATHS[path].spacings:
        for solver in ("ddim", "unipc"):
            base = NoiseSchedulerSettings(family, path=path, spacing=spacing, solver=solver)
            base = dataclasses.replace(base, sigmas=[0.9, 0.5, 0.3, 0.1] if spacing == "custom" else None)
            expected = sampled(base, gaussian)
            for name, value in UNUSED.items():
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    try:
                        given = dataclasses.replace(base, **{name: value})
                        resolve(given, 4)
                    except ValueError:
                        continue  # it is used, and does not fit
                    if caught:
                        assert torch.equal(sampled(given, gaussian), expected), (spacing, solver, name)


def sampled(settings: NoiseSchedulerSettings, gaussian: Any) -> torch.Tensor:
    scheduler = build(settings)
    grid = scheduler.grid(4, 64)
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    return torch.cat([scheduler.sample(noise, grid, gaussian.denoise, lambda i: noise), grid.tau[None, :3].float()])


def test_an_option_of_the_solver_is_not_taken_for_one_of_the_spacing() -> None:
    """`kind` of DPM-Solver and `b` of UniPC are also names of a growing shift and of a beta distribution."""
    growing = NoiseSchedulerSettings("rectified_flow", solver="dpmpp_2m", base_shift=0.5, max_shift=1.15)
    plain = build(growing).grid(4, 1024)
    assert torch.equal(build(dataclasses.replace(growing, kind="heun")).grid(4, 1024).sigma, plain.sigma)
    beta = NoiseSchedulerSettings("rectified_flow", solver="unipc", spacing="beta")
    assert torch.equal(build(dataclasses.replace(beta, b="bh1")).grid(4).sigma, build(beta).grid(4).sigma)
