"""The denoiser's objective: one loop for every family, fed and asked what the family's path and prediction say."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from harness.config.train import DenoiserConfig, LoopConfig
from harness.train import denoiser
from harness.train.denoiser import Examples

# The inverse of what each family's network is told.
TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "rectified_flow": lambda tau: tau / 1000,
    "ddpm": lambda tau: tau,
    "sgm": lambda tau: (4 * tau).exp(),
}


def tiny(family: str = "rectified_flow") -> DenoiserConfig:
    loop = LoopConfig(images=64, batch=4)
    return DenoiserConfig(family=family, width=16, depth=1, heads=2, text_channels=8, loop=loop)


class Oracle(nn.Module):
    """Knows that every latent is the constant ``value`` and answers with the exact target; keeps what it was told."""

    def __init__(self, family: str, value: float) -> None:
        super().__init__()
        self.family, self.value, self.time_of = denoiser.noise_scheduler(tiny(family)), value, TIMES[family]
        self.tau = torch.empty(0)

    def forward(self, x: Tensor, tau: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        self.tau = tau
        path, t_B111 = self.family.path, self.time_of(tau.double()).view(-1, 1, 1, 1)
        alpha, sigma = path.alpha(t_B111), path.sigma(t_B111)
        x0 = torch.full_like(x, self.value).double()
        eps = (x.double() / path.c_in(t_B111) - alpha * x0) / sigma
        return self.family.prediction.target(x0, eps, alpha, sigma).float()


@pytest.mark.parametrize("family", TIMES)
def test_the_exact_network_has_no_loss(family: str) -> None:
    oracle = Oracle(family, value=0.7)
    x0 = torch.full((64, 4, 16, 16), 0.7)
    states, mask = torch.zeros(64, 3, 8), torch.ones(64, 3, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    found = denoiser.loss(oracle, oracle.family, x0, states, mask, tiny(family), generator)
    wrong = denoiser.loss(oracle, oracle.family, x0 + 0.5, states, mask, tiny(family), generator)
    assert found.item() < 1e-4 < 0.05 < wrong.item()


def test_flow_times_are_logit_normal() -> None:
    oracle = Oracle("rectified_flow", value=0.0)
    states, mask = torch.zeros(4000, 1, 8), torch.ones(4000, 1, dtype=torch.bool)
    x0 = torch.zeros(4000, 1, 1, 1)
    denoiser.loss(oracle, oracle.family, x0, states, mask, tiny(), torch.Generator().manual_seed(0))
    logits = torch.logit(oracle.tau.double() / 1000)
    assert logits.mean().item() == pytest.approx(0.0, abs=4 / math.sqrt(4000))
    assert logits.std().item() == pytest.approx(1.0, abs=0.05)


def test_untrained_network_answers_zero() -> None:
    model = denoiser.build(tiny())
    answer = model(torch.randn(2, 4, 16, 16), torch.tensor([10.0, 900.0]), torch.randn(2, 3, 8))
    assert torch.equal(answer, torch.zeros(2, 4, 16, 16))


def test_batch_pairs_each_latent_with_a_caption_of_its_own() -> None:
    latents = torch.arange(6.0).view(6, 1, 1, 1)
    states = torch.arange(13.0).view(13, 1, 1).expand(13, 5, 8)
    mask = torch.tensor([[True] * (1 + i % 4) + [False] * (4 - i % 4) for i in range(13)])
    examples = Examples(latents, states, mask, [[2 * i, 2 * i + 1] for i in range(6)], [()] * 6)
    config = tiny()
    config.empty_share = 0.3
    seen = set()
    for step in range(40):
        x0, text, real = denoiser.batch(examples, config, step, torch.Generator().manual_seed(step))
        for latent, line in zip(x0.flatten().tolist(), text[:, 0, 0].tolist(), strict=True):
            assert line == 12 or line // 2 == latent
            seen.add(line)
        assert real.any(dim=0).all()
    assert seen == set(range(13))
