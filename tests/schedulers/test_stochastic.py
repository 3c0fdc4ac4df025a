"""DDIM's noise: eta = 1 is the DDPM posterior step by step, and its samples have the data's mean and variance."""

import math
from typing import Any

import pytest
import torch

from schedulers.build import build
from schedulers.families import Settings
from schedulers.solvers.base import Memory
from schedulers.solvers.euler import DDIM, Euler


def test_eta_1_is_the_ddpm_posterior(gaussian: Any) -> None:
    """Ho et al. 2020, equations 6 and 7, written with alpha-bar and beta as in the paper."""
    scheduler = build(Settings("ddpm", solver="ddim", eta=1.0))
    grid = scheduler.grid(1000)
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    for i in (0, 1, 400, 900, 997, 998):
        t = 999 - i
        beta, prev = 1 - bar[t] / bar[t - 1], bar[t - 1]
        x0 = gaussian.denoise(x, grid[i]).x0
        mean = prev.sqrt() * beta / (1 - bar[t]) * x0 + (1 - beta).sqrt() * (1 - prev) / (1 - bar[t]) * x
        std = ((1 - prev) / (1 - bar[t]) * beta).sqrt()
        quiet = scheduler.solver.step(x, i, grid, gaussian.denoise, Memory(), lambda i: zero)
        loud = scheduler.solver.step(x, i, grid, gaussian.denoise, Memory(), lambda i: one)
        torch.testing.assert_close(quiet, mean, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(loud - quiet, std.expand(9), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (Settings("ddpm", solver="ddim", eta=1.0), 1000),
        (Settings("ddpm", solver="ddim", eta=0.5), 500),
        (Settings("sgm", solver="ddim", eta=1.0), 400),
        (Settings("rectified_flow", solver="ddim", eta=1.0), 400),
    ],
)
def test_samples_have_the_mean_and_variance_of_the_data(settings: Settings, steps: int, gaussian: Any) -> None:
    scheduler, generator, count = build(settings), torch.Generator().manual_seed(5), 20_000
    grid = scheduler.grid(steps)
    x = scheduler.init_noise(torch.randn(count, generator=generator), grid)
    x = scheduler.sample(x, grid, gaussian.denoise, lambda i: torch.randn(count, generator=generator))
    error_of_mean, error_of_std = gaussian.std / math.sqrt(count), gaussian.std / math.sqrt(2 * count)
    assert x.mean().item() == pytest.approx(gaussian.mean, abs=4 * error_of_mean + 0.005)
    assert x.std().item() == pytest.approx(gaussian.std, abs=4 * error_of_std + 0.01)


def test_noise_is_asked_for_only_where_it_is_added(gaussian: Any) -> None:
    for settings in (Settings("ddpm", solver="ddim", eta=0.7), Settings("rectified_flow", solver="ddim", eta=0.7)):
        asked: list[int] = []
        scheduler = build(settings)

        def noise(i: int, asked: list[int] = asked) -> torch.Tensor:
            asked.append(i)
            return torch.zeros(3)

        scheduler.sample(torch.ones(3), scheduler.grid(5), gaussian.denoise, noise)
        assert asked == [0, 1, 2, 3]


def test_eta_0_is_euler_to_the_bit_and_eta_1_from_pure_noise_forgets_it(gaussian: Any) -> None:
    x, grid = torch.linspace(-2, 2, 9), build(Settings("rectified_flow")).grid(4)
    quiet = [s.step(x, 0, grid, gaussian.denoise, Memory(), torch.zeros) for s in (Euler(), DDIM(0.0))]
    assert torch.equal(*quiet)
    forgotten = DDIM(1.0).step(x, 0, grid, gaussian.denoise, Memory(), lambda i: torch.zeros(9))
    assert forgotten.std().item() == pytest.approx(0.0, abs=1e-7)
    with pytest.raises(ValueError, match=r"eta=1\.5"):
        DDIM(1.5)
