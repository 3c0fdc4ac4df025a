"""Paths against their definitions: inverses, the forward SDE's coefficients, and the limits."""

import math
from typing import Any

import pytest
import torch

from schedulers import paths, spacing

DISCRETE = paths.DiscreteVPPath(paths.betas("linear"))
EVERY: dict[str, paths.NoisePath] = {
    "flow": paths.FlowPath(),
    "edm": paths.EDMPath(),
    "ve": paths.GeometricVEPath(),
    "vp": paths.ContinuousVPPath(),
    "sub_vp": paths.ContinuousVPPath(sub=True),
    "discrete": DISCRETE,
    "discrete_linear": paths.DiscreteVPPath(paths.betas("scaled_linear", 0.00085, 0.012), interpolation="linear"),
    "in_ve_coordinates": paths.VECoordinates(DISCRETE),
}


def times(path: paths.NoisePath) -> torch.Tensor:
    """Return times inside the path, away from its ends and, on a discrete one, from its knots."""
    share = torch.linspace(0.0513, 0.9487, 13, dtype=torch.float64)
    return path.t_min + share * (path.t_max - path.t_min)


@pytest.mark.parametrize("name", list(EVERY))
def test_t_of_inverts_sigma_over_alpha(name: str) -> None:
    path = EVERY[name]
    t = times(path)
    torch.testing.assert_close(path.t_of(path.sigma(t) / path.alpha(t)), t, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", list(EVERY))
def test_drift_and_diffusion_are_those_of_the_forward_sde(name: str) -> None:
    """f = (log alpha)' and g^2 = (sigma^2)' - 2 f sigma^2, by central differences."""
    path = EVERY[name]
    t = times(path)
    h = 1e-6 * (path.t_max - path.t_min)
    slope = (path.alpha(t + h).log() - path.alpha(t - h).log()) / (2 * h)
    growth = (path.sigma(t + h) ** 2 - path.sigma(t - h) ** 2) / (2 * h)
    torch.testing.assert_close(path.drift(t), slope, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(path.diffusion(t), growth - 2 * slope * path.sigma(t) ** 2, rtol=1e-5, atol=1e-8)


def test_vp_and_sub_vp_are_song_s() -> None:
    """Equations 29 and 30 of arXiv 2011.13456, with the integral of beta by quadrature."""
    t = torch.tensor([0.01, 0.3, 0.7, 1.0], dtype=torch.float64)
    grid = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    integral = torch.stack([torch.trapezoid(0.1 + 19.9 * (grid * end), grid * end) for end in t])
    vp, sub = EVERY["vp"], EVERY["sub_vp"]
    torch.testing.assert_close(vp.alpha(t), (-integral / 2).exp(), rtol=1e-9, atol=0)
    torch.testing.assert_close(vp.sigma(t) ** 2, 1 - (-integral).exp(), rtol=1e-9, atol=0)
    torch.testing.assert_close(sub.sigma(t), 1 - (-integral).exp(), rtol=1e-9, atol=0)
    torch.testing.assert_close(vp.tau(t), 999 * t)
    torch.testing.assert_close(vp.diffusion(t), 0.1 + 19.9 * t)


def test_ve_is_geometric_and_edm_passes_the_configured_time() -> None:
    ve = paths.GeometricVEPath(0.01, 50.0)
    assert ve.sigma(0.5) == pytest.approx(math.sqrt(0.01 * 50))
    assert (ve.tau(1.0), ve.t_of(0.001)) == (pytest.approx(50.0), 0.0)
    taus = {"log_sigma": math.log(3) / 4, "sigma": 3.0, "flow_time": 750.0, "arctan": math.atan(3) * 2 / math.pi}
    for name, tau in taus.items():
        assert paths.EDMPath(tau_map=name).tau(3.0) == pytest.approx(tau)  # type: ignore[arg-type]


def test_zero_terminal_snr_ends_at_pure_noise_and_starts_where_it_did() -> None:
    """The rescaling to zero terminal SNR is Lin et al. 2023, Algorithm 1."""
    before = paths.betas("scaled_linear", 0.00085, 0.012)
    after = paths.zero_terminal_snr(before)
    path = paths.DiscreteVPPath(after)
    assert (path.alpha(999.0), path.sigma(999.0)) == (0.0, 1.0)
    assert path.alpha(0.0) == pytest.approx(paths.DiscreteVPPath(before).alpha(0.0), rel=1e-12)
    assert (path.t_of(math.inf), path.t_of(path.sigma(500.0) / path.alpha(500.0))) == (999.0, pytest.approx(500.0))
    grid = spacing.Trailing().grid(path, 4)
    assert (grid[0].alpha, grid[0].ratio, grid[0].log_snr) == (0.0, math.inf, -math.inf)
    floored = paths.DiscreteVPPath(after, last_alpha_bar=2.0**-24)
    assert floored.alpha(999.0) ** 2 == pytest.approx(2.0**-24)
    assert floored.alpha(500.0) == path.alpha(500.0)


@pytest.mark.parametrize("interpolation", ["log", "linear"])
def test_a_raised_last_alpha_bar_below_its_neighbours_noise_is_found_again(interpolation: Any) -> None:
    """The linear betas at zero terminal SNR: index 998 is noisier than 2^-24, and only 2^-24 itself is index 999."""
    betas = paths.zero_terminal_snr(paths.betas("linear"))
    path = paths.DiscreteVPPath(betas, interpolation, last_alpha_bar=2.0**-24)
    t = torch.tensor([998.0, 999.0, 900.0], dtype=torch.float64)
    ratio = path.sigma(t) / path.alpha(t)
    assert ratio[0] > ratio[1] > ratio[2]
    torch.testing.assert_close(path.t_of(ratio), t)
    assert spacing.Trailing().grid(path, 10)[1].t == 899
    with pytest.raises(ValueError, match=r"goes from 4096 at t=999 to 15.*use fewer steps"):
        spacing.Trailing().grid(path, 1000)


def test_impossible_parameters_are_refused() -> None:
    for wrong in (
        lambda: paths.GeometricVEPath(1.0, 0.5),
        lambda: paths.ContinuousVPPath(0.1, 0.05),
        lambda: paths.EDMPath(t_min=0.0),
        lambda: paths.DiscreteVPPath(torch.tensor([0.1, 1.0, 0.2])),
        lambda: paths.DiscreteVPPath(torch.tensor([0.1, 0.2]), last_alpha_bar=0.0),
    ):
        with pytest.raises(ValueError, match=r"need|give a number inside"):
            wrong()
