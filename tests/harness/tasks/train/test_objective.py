"""One objective, three families: exact networks have no loss, the minimum is the closed form, times are as stated."""

import ast
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import harness.tasks.train
from harness.config.train import DenoiserConfig, Precision, TimeSampling
from harness.resolve.compose import compose_run
from harness.resolve.scheduler import noise_scheduler_settings
from harness.tasks.train.objective import Objective, objective
from models.components import Conditioning
from schedulers.build import build as build_noise_scheduler
from schedulers.grid import Point
from schedulers.settings import NoiseSchedulerSettings
from schedulers.tables import FAMILIES, PATHS, families

# The inverse of the time embedding's input, for each family.
TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "flow": lambda tau: tau / 1000,
    "discrete_vp": lambda tau: tau,
    "edm": lambda tau: tau / (1000 - tau),
    "ve": lambda tau: (tau / 0.01).log() / math.log(50 / 0.01),
    "vp": lambda tau: tau / 999,
    "sub_vp": lambda tau: tau / 999,
}
EVERY = [
    pytest.param(NoiseSchedulerSettings(family, prediction=prediction, path=path), id=f"{path}-{prediction}")
    for family, paths in families().items()
    for path in paths
    for prediction in PATHS[path].predictions
    if prediction != "score"
]
MEAN, STD = 0.5, 0.8


def of(family: str, config: DenoiserConfig | None = None) -> Objective:
    return objective(config or DenoiserConfig(), NoiseSchedulerSettings(family))


def loss(chosen: Objective, model: nn.Module, x0: Tensor, seed: int = 0) -> Tensor:
    states, mask = torch.zeros(len(x0), 1, 8), torch.ones(len(x0), 1, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    return chosen.loss(model, chosen.noise_scheduler(), x0, states, mask, generator)


class TauRecorder(nn.Module):
    """A network that recovers t from tau and x from its input, and keeps the times that it gets."""

    def __init__(self, chosen: Objective) -> None:
        super().__init__()
        self.noise_scheduler, self.time_of = chosen.noise_scheduler(), TIMES[chosen.settings.path or ""]
        self.tau = torch.empty(0)

    def forward(self, x: Tensor, tau: Tensor, condition: Conditioning) -> Tensor:
        self.tau = tau
        path, t_B111 = self.noise_scheduler.path, self.time_of(tau.double()).view(-1, 1, 1, 1)
        alpha, sigma = path.alpha(t_B111), path.sigma(t_B111)
        return self.answer(x.double() / path.c_in(t_B111), alpha, sigma).float()

    def answer(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Oracle(TauRecorder):
    """A network that knows every latent is the constant ``value`` and answers with the exact target."""

    def __init__(self, chosen: Objective, value: float) -> None:
        super().__init__(chosen)
        self.value = value

    def answer(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        x0 = torch.full_like(x, self.value)
        return self.noise_scheduler.prediction.target(x0, (x - alpha * x0) / sigma, alpha, sigma)


class Posterior(TauRecorder):
    """Answers scale F + shift, where F is the average target at x for N(MEAN, STD^2) data."""

    def __init__(self, chosen: Objective, scale: Tensor, shift: Tensor) -> None:
        super().__init__(chosen)
        self.scale, self.shift = scale, shift

    def answer(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        x0 = expected_x0(x, alpha, sigma)
        target = self.noise_scheduler.prediction.target(x0, (x - alpha * x0) / sigma, alpha, sigma)
        return self.scale * target + self.shift


def expected_x0(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return E[x0 | x] for x0 ~ N(MEAN, STD^2)."""
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exact_network_has_no_loss(family: str) -> None:
    oracle = Oracle(of(family), value=0.7)
    x0 = torch.full((64, 4, 16, 16), 0.7)
    found, wrong = loss(of(family), oracle, x0), loss(of(family), oracle, x0 + 0.5)
    assert found.item() < 1e-4 < 0.05 < wrong.item()


@pytest.mark.parametrize("settings", EVERY)
def test_the_minimum_on_gaussian_data_is_the_closed_form(settings: NoiseSchedulerSettings) -> None:
    """The loss is a parabola in scale and shift; Newton's step from (0, 0) lands on its minimum, which is (1, 0)."""
    chosen = objective(DenoiserConfig(), settings)
    x0 = MEAN + STD * torch.randn(100_000, 1, 1, 1, generator=torch.Generator().manual_seed(1))

    def parabola(p: Tensor) -> Tensor:
        return loss(chosen, Posterior(chosen, p[0], p[1]), x0)

    start = torch.zeros(2, requires_grad=True)
    (slope,) = torch.autograd.grad(parabola(start), start)
    curvature = torch.autograd.functional.hessian(parabola, torch.zeros(2))
    least = -torch.linalg.solve(curvature, slope)
    error = (2 * parabola(least) * torch.linalg.inv(curvature).diagonal() / len(x0)).sqrt()  # of least squares
    assert ((least - torch.tensor([1.0, 0.0])).abs() < 4 * error).all()
    assert error.max() < 0.02


@pytest.mark.parametrize("settings", EVERY)
def test_that_minimum_is_the_expected_image(settings: NoiseSchedulerSettings) -> None:
    chosen = objective(DenoiserConfig(), settings)
    path = chosen.noise_scheduler().path
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for t in (path.t_of(ratio) for ratio in (0.05, 0.5, 1.0, 4.0)):
        alpha, sigma = path.alpha(t), path.sigma(t)
        network = Posterior(chosen, torch.tensor(1.0), torch.tensor(0.0))
        a, s = (torch.tensor(value, dtype=torch.float64) for value in (alpha, sigma))
        output = network.answer(x, a, s)
        point = Point(t, alpha, sigma, path.tau(t), path.c_in(t))
        estimate = chosen.noise_scheduler().prediction.estimate(output, x, point)
        expected = expected_x0(x, a, s)
        torch.testing.assert_close(estimate.x0, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(estimate.eps, (x - alpha * expected) / sigma, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shipped_model_states_what_is_trained(family: str) -> None:
    stated = compose_run([f"scheduler={family}", "model.load=dummy"]).config.scheduler
    facts = build_noise_scheduler(noise_scheduler_settings(stated))
    trained = of(family).noise_scheduler()
    assert facts.prediction == trained.prediction
    t = trained.path.t_of(torch.tensor([0.05, 1.0, 20.0], dtype=torch.float64))
    for name in ("alpha", "sigma", "c_in", "tau"):
        assert torch.equal(getattr(facts.path, name)(t), getattr(trained.path, name)(t)), name


def taus(chosen: Objective, count: int = 20_000) -> Tensor:
    """Return the times that a network gets in ``count`` samples, float64."""
    network = TauRecorder(chosen)
    loss(chosen, network, torch.zeros(count, 1, 1, 1))
    return network.tau.double()


@pytest.mark.parametrize(("family", "mean", "std"), [("rectified_flow", 0.0, 1.0), ("sgm", 0.29, 1.0)])
def test_flow_and_sgm_times_are_log_normal(family: str, mean: float, std: float) -> None:
    logits = torch.logit(taus(of(family)) / 1000)
    assert logits.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(len(logits)))
    assert logits.std().item() == pytest.approx(std, abs=0.02)
    assert ((logits - mean).abs() < 0.6745 * std).double().mean().item() == pytest.approx(0.5, abs=0.015)


def test_ddpm_times_are_even_over_the_trained_indices() -> None:
    tau = taus(of("ddpm"))
    assert torch.equal(tau, tau.floor())
    assert (tau.min().item(), tau.max().item()) == (0.0, 999.0)
    counts = torch.histc(tau, bins=20, min=0, max=1000)
    expected = len(tau) / 20
    assert ((counts - expected) ** 2 / expected).sum().item() < 43.8  # chi-square of 19 degrees of freedom, p = .001


def test_times_can_be_chosen() -> None:
    flow = taus(of("rectified_flow", config=DenoiserConfig(times=TimeSampling.uniform)))
    assert flow.mean().item() == pytest.approx(500, abs=10)
    assert flow.std().item() == pytest.approx(1000 / math.sqrt(12), abs=5)
    narrow = taus(of("sgm", config=DenoiserConfig(ratio_mean=-1.2, ratio_std=0.5)))
    logits = torch.logit(narrow / 1000)
    assert (logits.mean().item(), logits.std().item()) == pytest.approx((-1.2, 0.5), abs=0.02)
    continuous = taus(objective(DenoiserConfig(), NoiseSchedulerSettings("sgm", prediction="eps", path="vp"))) / 999
    assert (continuous.min().item(), continuous.max().item()) == pytest.approx((1e-3, 1.0), abs=1e-3)
    assert continuous.mean().item() == pytest.approx(0.5, abs=0.01)
    few = taus(objective(DenoiserConfig(), NoiseSchedulerSettings("ddpm", train_steps=10)))
    assert sorted(set(few.tolist())) == [float(i) for i in range(10)]


@pytest.mark.parametrize(
    ("family", "config", "hint"),
    [
        ("sgm", DenoiserConfig(times=TimeSampling.uniform), "use log_normal"),
        ("ddpm", DenoiserConfig(ratio_mean=0.0), "times=log_normal"),
        ("sgm", DenoiserConfig(ratio_std=0.0), "above 0"),
    ],
)
def test_times_that_cannot_be_are_refused(family: str, config: DenoiserConfig, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        of(family, config=config)


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        (NoiseSchedulerSettings("sgm", path="vp"), "prediction=eps"),
        (NoiseSchedulerSettings("sgm", prediction="score"), "prediction=eps"),
        (NoiseSchedulerSettings("ddpm", learned_variance=True), "learned_variance"),
    ],
)
def test_what_the_loss_is_not_made_for_is_refused(settings: NoiseSchedulerSettings, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        objective(DenoiserConfig(), settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_the_networks_arithmetic_alone(family: str) -> None:
    seen: list[torch.dtype] = []

    class Linear(nn.Linear):
        def forward(self, x: Tensor, *taus: object) -> Tensor:
            output = super().forward(x)
            seen.append(output.dtype)
            return output

    model = Linear(8, 8)
    x0 = torch.randn(16, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    exact = loss(of(family), model, x0)
    half = loss(of(family, config=DenoiserConfig(dtype=Precision.bfloat16)), model, x0)
    assert seen == [torch.float32, torch.bfloat16]
    assert (half.dtype, model.weight.dtype) == (torch.float32, torch.float32)
    half.backward()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.float32
    assert 0 < abs(half.item() - exact.item()) < 0.01 * exact.item()


def test_there_is_one_loop_and_no_branch_on_a_family() -> None:
    """One function descends the gradient; families are rows of a table, which only the export compares by name."""
    descents, compared = [], []
    for path in Path(harness.tasks.train.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "backward":
                descents.append(path.name)
            if isinstance(node, ast.Compare):
                named = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                compared += [path.name for value in named if value in FAMILIES]
    assert descents == ["loop.py"]
    assert set(compared) == {"export.py"}
