"""Stochastic solvers: single steps in closed form, and samples with the mean and covariance of a known mixture."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from schedulers.build import build
from schedulers.compatibility import NoiseSchedulerSettings
from schedulers.grid import Grid, Point
from schedulers.prediction import Estimate
from schedulers.solvers.base import Denoise, Noise, SolverState
from schedulers.solvers.euler import DDIM, Euler
from schedulers.solvers.posterior import DDPM
from schedulers.solvers.sde import PredictorCorrector


def test_eta_1_is_the_ddpm_posterior(gaussian: Any) -> None:
    """Ho et al. 2020, equations 6 and 7, written with alpha-bar and beta as in the paper."""
    scheduler = build(NoiseSchedulerSettings("ddpm", solver="ddim", eta=1.0))
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
        quiet = scheduler.solver.step(x, i, grid, gaussian.denoise, SolverState(), lambda i: zero)
        loud = scheduler.solver.step(x, i, grid, gaussian.denoise, SolverState(), lambda i: one)
        torch.testing.assert_close(quiet, mean, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(loud - quiet, std.expand(9), rtol=1e-9, atol=1e-10)


class Mixture:
    """Two Gaussians in the plane: the posterior means of x0 and eps given x, in closed form."""

    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([[-1.0, 0.5], [0.8, -0.4]], dtype=torch.float64)
    stds = torch.tensor([0.25, 0.35], dtype=torch.float64)

    def denoise(self, x: Tensor, point: Point) -> Estimate:
        """Return E[x0 | x] and E[eps | x] of x (N, 2)."""
        variance = (point.alpha * self.stds) ** 2 + point.sigma**2
        off = x[:, None, :].double() - point.alpha * self.means
        log_likelihood = -(off**2).sum(-1) / (2 * variance) - variance.log()
        share = (log_likelihood + self.weights.log()).softmax(dim=1)[..., None]
        x0 = (share * (self.means + (point.alpha * self.stds**2 / variance)[:, None] * off)).sum(1)
        eps = (share * (point.sigma / variance)[:, None] * off).sum(1)
        return Estimate(x0.to(x.dtype), eps.to(x.dtype))

    @property
    def mean(self) -> Tensor:
        """Return the mean, (2,)."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """Return the covariance, (2, 2)."""
        off = self.means - self.mean
        return torch.einsum("k,ki,kj->ij", self.weights, off, off) + (self.weights * self.stds**2).sum() * torch.eye(2)


FLOW = {"sigma_first": 0.999}
CASES: list[tuple[NoiseSchedulerSettings, int]] = [
    (NoiseSchedulerSettings(family, path=path, solver=solver, **options), steps)  # type: ignore[arg-type]
    for family, path in [("ddpm", None), ("rectified_flow", None), ("sgm", "edm"), ("sgm", "vp")]
    for solver, options, steps in [
        ("ancestral", {}, 200),
        ("ddpm", {}, 200),
        ("dpm2", {"eta": 1.0}, 80),
        ("dpmpp_2m_sde", {}, 160),
        ("edm_churn", {"s_churn": 30.0, "s_noise": 1.0, **(FLOW if family == "rectified_flow" else {})}, 80),
        ("euler_maruyama", FLOW if family == "rectified_flow" else {}, 300),
        ("predictor_corrector", {"snr": 0.1}, 120),
    ]
]
CASES += [
    (NoiseSchedulerSettings("sgm", path="sub_vp", solver="euler_maruyama"), 300),
    (NoiseSchedulerSettings("ddpm", solver="ddim", eta=0.5), 150),
]


@pytest.mark.parametrize(
    ("settings", "steps"),
    CASES,
    ids=lambda v: f"{v.family}-{v.path}-{v.solver}" if isinstance(v, NoiseSchedulerSettings) else str(v),
)
def test_samples_have_the_mean_and_covariance_of_a_mixture(
    settings: NoiseSchedulerSettings, steps: int, record_property: Any
) -> None:
    """Within 4 standard errors of 3,000 samples, for each mean and each entry of the covariance."""
    mixture, count = Mixture(), 3_000
    scheduler, generator = build(settings), torch.Generator().manual_seed(5)
    grid = scheduler.grid(steps)
    x = scheduler.init_noise(torch.randn(count, 2, generator=generator), grid)
    x = scheduler.sample(x, grid, mixture.denoise, lambda i: torch.randn(count, 2, generator=generator)).double()
    truth = torch.multinomial(mixture.weights, 200_000, replacement=True, generator=generator)
    reference = mixture.means[truth] + mixture.stds[truth, None] * torch.randn(200_000, 2, generator=generator).double()
    off = x.mean(0) - mixture.mean
    errors = [(off / (mixture.covariance.diagonal() / count).sqrt()).abs().max()]
    products = torch.einsum("ni,nj->nij", *[x - mixture.mean] * 2)
    spread = torch.einsum("ni,nj->nij", *[reference - mixture.mean] * 2).std(0)
    errors.append(((products.mean(0) - mixture.covariance) / (spread / math.sqrt(count))).abs().max())
    record_property("standard_errors", [round(float(e), 2) for e in errors])
    assert max(errors) < 4


def test_lcm_adds_new_noise_around_its_jump(gaussian: Any) -> None:
    """Luo et al. 2023, Algorithm 3: nothing of the old noise is left."""
    scheduler = build(NoiseSchedulerSettings("ddpm", solver="lcm", spacing="lcm"))
    grid = scheduler.grid(4)
    x, z = torch.linspace(-2, 2, 9, dtype=torch.float64), torch.full((9,), 0.7)
    u, d = 10 * grid[1].tau, 0.5
    f = d**2 / (u**2 + d**2) * x + u / math.sqrt(u**2 + d**2) * gaussian.denoise(x, grid[1]).x0
    moved = scheduler.step(x, 1, grid, gaussian.denoise, SolverState(), lambda i: z)
    torch.testing.assert_close(moved, grid[2].alpha * f + grid[2].sigma * z.double())


def test_the_large_variance_is_beta_and_a_learned_one_lies_between(gaussian: Any) -> None:
    """Ho et al. 2020, section 3.2; Nichol and Dhariwal 2021, equation 15."""
    grid = build(NoiseSchedulerSettings("ddpm")).grid(1000)
    x, one = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    beta = float((1e-4 + torch.linspace(0, 1, 1000, dtype=torch.float64) * 0.0199)[999 - 600])

    def spread(
        variance: str, v: float | None = None, final_noise: bool = False, i: int = 600, on: Grid = grid
    ) -> float:
        def denoise(x: Tensor, point: Point) -> Estimate:
            known = gaussian.denoise(x, point)
            return Estimate(known.x0, known.eps, None if v is None else torch.full_like(x, v))

        solver = DDPM(variance, final_noise)  # type: ignore[arg-type]
        moved = [solver.step(x, i, on, denoise, SolverState(), lambda i, z=z: z) for z in (one, 0 * one)]  # type: ignore[misc]
        return float((moved[0] - moved[1])[0])

    small, large = spread("small"), spread("large")
    assert large**2 == pytest.approx(beta, rel=1e-9)
    assert small**2 == pytest.approx(beta * grid[601].sigma ** 2 / grid[600].sigma ** 2, rel=1e-9)
    assert spread("learned_range", -1.0) == pytest.approx(small)
    assert spread("learned_range", 1.0) == pytest.approx(large)
    assert spread("learned_range", 0.0) == pytest.approx(math.sqrt(small * large))
    assert spread("learned", 0.04) == pytest.approx(0.2)
    coarse = build(NoiseSchedulerSettings("ddpm", steps_offset=1)).grid(
        10
    )  # its last step starts at the second trained index
    assert spread("large", i=9, on=coarse) == 0
    assert spread("large", final_noise=True, i=9, on=coarse) == pytest.approx(coarse[9].sigma)
    with pytest.raises(ValueError, match="variance=learned_range needs a checkpoint"):
        spread("learned_range")


def test_langevin_corrections_leave_the_marginal_where_it_is(gaussian: Any) -> None:
    """Corrections alone, at one row, keep samples of that row's own marginal there."""
    scheduler, generator = build(NoiseSchedulerSettings("sgm", path="vp")), torch.Generator().manual_seed(1)
    grid = scheduler.grid(10)
    point, count = grid[5], 40_000
    still = PredictorCorrector(predictor=Still(), corrections=20, snr=0.05)
    x = gaussian.flow(torch.randn(count, 1, generator=generator, dtype=torch.float64), point)
    x = still.step(x, 5, grid, gaussian.denoise, SolverState(), lambda i: torch.randn(count, 1, generator=generator))
    std = math.hypot(point.alpha * gaussian.std, point.sigma)
    assert float(x.mean()) == pytest.approx(point.alpha * gaussian.mean, abs=4 * std / math.sqrt(count))
    assert float(x.std()) == pytest.approx(std, abs=4 * std / math.sqrt(2 * count) + 0.01 * std)


class Still:
    """A predictor that does not move."""

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Return x unchanged."""
        return x

    def evaluations(self, grid: Grid) -> int:
        """Return no evaluations."""
        return 0


def test_noise_is_requested_only_where_it_is_added(gaussian: Any) -> None:
    for settings in (
        NoiseSchedulerSettings("ddpm", solver="ddim", eta=0.7),
        NoiseSchedulerSettings("rectified_flow", solver="ddim", eta=0.7),
    ):
        requested: list[int] = []
        scheduler = build(settings)

        def noise(i: int, requested: list[int] = requested) -> torch.Tensor:
            requested.append(i)
            return torch.zeros(3)

        scheduler.sample(torch.ones(3), scheduler.grid(5), gaussian.denoise, noise)
        assert requested == [0, 1, 2, 3]


def test_eta_0_is_euler_to_the_bit_and_eta_1_from_pure_noise_forgets_it(gaussian: Any) -> None:
    x, grid = torch.linspace(-2, 2, 9), build(NoiseSchedulerSettings("rectified_flow")).grid(4)
    quiet = [s.step(x, 0, grid, gaussian.denoise, SolverState(), torch.zeros) for s in (Euler(), DDIM(0.0))]
    assert torch.equal(*quiet)
    forgotten = DDIM(1.0).step(x, 0, grid, gaussian.denoise, SolverState(), lambda i: torch.zeros(9))
    assert forgotten.std().item() == pytest.approx(0.0, abs=1e-7)
    with pytest.raises(ValueError, match=r"eta=1\.5"):
        DDIM(1.5)
