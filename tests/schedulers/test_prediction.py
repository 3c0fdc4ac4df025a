"""Predictions: the target of a known x0 and eps is estimated back, over all of sigma and in every coordinate system."""

import math

import pytest
import torch
from torch import Tensor

from schedulers import paths
from schedulers.grid import Point
from schedulers.prediction import EDM, X0, Clipped, Eps, Flow, Prediction, V

ALL: list[Prediction] = [Eps(), X0(), V(), Flow(), EDM(0.5), EDM(1.3, -1), Clipped(V(), 100.0)]
VP = paths.DiscreteVPPath(paths.betas("linear"))
PATHS: dict[str, paths.NoisePath] = {
    "vp": VP,
    "squaredcos": paths.DiscreteVPPath(paths.betas("squaredcos")),
    "ve_of_vp": paths.VECoordinates(VP),
    "edm": paths.EDMPath(),
    "flow": paths.FlowPath(),
}


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return x0 and eps of shape (2, 3, 4)."""
    generator = torch.Generator().manual_seed(3)
    x0 = 0.5 * torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    return x0.to(dtype), torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).to(dtype)


def point(path: paths.NoisePath, t: float) -> Point:
    """Return the path's row at t."""
    return Point(t, path.alpha(t), path.sigma(t), path.tau(t), path.c_in(t))


@pytest.mark.parametrize("prediction", ALL, ids=str)
@pytest.mark.parametrize("named", list(PATHS))
def test_round_trip(prediction: Prediction, named: str) -> None:
    path, (x0, eps) = PATHS[named], pair()
    for share in torch.linspace(0.001, 0.999, 25, dtype=torch.float64).tolist():
        t = path.t_min + share * (path.t_max - path.t_min)
        p = point(path, t)
        alpha, sigma = torch.tensor([[[p.alpha]]], dtype=x0.dtype), torch.tensor([[[p.sigma]]], dtype=x0.dtype)
        x = alpha * x0 + sigma * eps
        found = prediction.estimate(prediction.target(x0, eps, alpha, sigma), x, p)
        torch.testing.assert_close(found.x0, x0, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.eps, eps, rtol=1e-8, atol=1e-8)


def test_targets_are_the_published_ones() -> None:
    x0, eps = pair()
    one, sigma = torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64)
    x = x0 + sigma * eps
    c_skip = 0.25 / (sigma**2 + 0.25)
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    torch.testing.assert_close(EDM(0.5).target(x0, eps, one, sigma), (x0 - c_skip * x) / c_out)  # Karras, equation 8
    torch.testing.assert_close(EDM(1.0, -1).target(x0, eps, one, sigma), V().target(x0, eps, one, sigma))
    alpha, sigma = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    torch.testing.assert_close(V().target(x0, eps, alpha, sigma), 0.6 * eps - 0.8 * x0)
    assert torch.equal(Flow().target(x0, eps, alpha, sigma), eps - x0)


@pytest.mark.parametrize("prediction", ALL, ids=str)
@pytest.mark.parametrize("end", [(0.0, 1.0), (1e-9, 1.0), (1.0, 0.0), (1.0, 80.0)])
def test_estimates_are_finite_at_the_ends(prediction: Prediction, end: tuple[float, float]) -> None:
    x0, eps = pair(torch.float32)
    found = prediction.estimate(eps, end[0] * x0 + end[1] * eps, Point(0.0, *end, 0.0, 1.0))
    assert torch.isfinite(found.x0).all()
    assert torch.isfinite(found.eps).all()


@pytest.mark.parametrize("prediction", [V(), Flow(), EDM(0.5)], ids=str)
def test_rotations_are_exact_at_both_ends(prediction: Prediction) -> None:
    x0, eps = pair(torch.float32)
    for alpha, sigma in [(0.0, 1.0), (1.0, 0.0)]:
        a, s = torch.tensor(alpha), torch.tensor(sigma)
        found = prediction.estimate(prediction.target(x0, eps, a, s), a * x0 + s * eps, Point(0, alpha, sigma, 0, 1))
        torch.testing.assert_close(found.x0, x0)
        torch.testing.assert_close(found.eps, eps)


def test_half_precision_output_gives_an_estimate_in_the_states_dtype() -> None:
    x0, eps = pair(torch.float32)
    for prediction in ALL:
        found = prediction.estimate(eps.bfloat16(), x0, Point(0, 0.6, 0.8, 0, 1))
        assert (found.x0.dtype, found.eps.dtype) == (torch.float32, torch.float32)


def test_clipping_keeps_the_raw_eps_by_default() -> None:
    x, output, p = torch.tensor([3.0]), torch.tensor([0.5]), Point(0, 0.6, 0.8, 0, 1)
    kept, derived = (Clipped(Eps(), 1.0, again).estimate(output, x, p) for again in (False, True))
    assert (kept.x0.item(), kept.eps.item()) == (1.0, 0.5)
    assert derived.eps.item() == pytest.approx((3.0 - 0.6) / 0.8)


@pytest.mark.parametrize("named", list(PATHS))
def test_t_of_inverts_sigma_over_alpha(named: str) -> None:
    path = PATHS[named]
    t = torch.linspace(path.t_min, path.t_max, 97, dtype=torch.float64)[1:-1] + 1e-4
    torch.testing.assert_close(path.t_of(path.sigma(t) / path.alpha(t)), t, rtol=1e-9, atol=1e-9)
    linear = paths.DiscreteVPPath(paths.betas("linear"), interpolation="linear")
    assert linear.t_of(linear.sigma(20.3) / linear.alpha(20.3)) == pytest.approx(20.3)


@pytest.mark.parametrize("named", list(PATHS))
def test_paths_give_back_what_they_were_given(named: str) -> None:
    path = PATHS[named]
    for method in (path.alpha, path.sigma, path.tau, path.c_in):
        assert isinstance(method(0.5), float)
        assert method(torch.full((2, 1), 0.5)).dtype == torch.float32
        assert method(torch.full((2, 1), 0.5, dtype=torch.float64)).shape == (2, 1)
        assert method(torch.tensor([1, 1])).dtype == torch.get_default_dtype()
        t = torch.full((2,), 0.5, dtype=torch.float64)
        assert method(t).data_ptr() != t.data_ptr()
    assert math.isfinite(path.tau(0.0))


def test_the_times_that_the_network_gets() -> None:
    assert paths.FlowPath().tau(0.25) == 250.0
    assert paths.EDMPath().tau(math.exp(2.0)) == pytest.approx(0.5)
    assert paths.EDMPath(tau_map="flow_time").tau(3.0) == pytest.approx(paths.FlowPath().tau(0.75))
    assert paths.EDMPath(tau_map="sigma").tau(3.0) == 3.0
    assert VP.tau(17.0) == 17.0
