"""The denoiser: an untrained network answers zero, and a batch pairs each image with its own captions."""

import dataclasses
from pathlib import Path

import pytest
import torch

from harness.config.train import DenoiserConfig, LoopConfig, Precision
from harness.tasks.train import denoiser
from harness.tasks.train.denoiser import Examples
from harness.tasks.train.objective import objective
from models.components import Conditioning
from schedulers.settings import NoiseSchedulerSettings


def tiny() -> DenoiserConfig:
    loop = LoopConfig(images=64, batch=4)
    return DenoiserConfig(width=16, depth=1, heads=2, text_channels=8, loop=loop)


def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)
    latents, states = torch.randn(5, 4, 16, 16, generator=generator), torch.randn(6, 3, 8, generator=generator)
    mask = torch.ones(6, 3, dtype=torch.bool)
    return Examples(latents, states, mask, [[i, i] for i in range(5)], [()] * 5)


def test_untrained_network_answers_zero() -> None:
    model = denoiser.build(tiny())
    answer = model(torch.randn(2, 4, 16, 16), torch.tensor([10.0, 900.0]), Conditioning(torch.randn(2, 3, 8)))
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


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(tiny(), latent_size=8)
    with pytest.raises(ValueError, match=r"latent_size=8.* set it to 16"):
        denoiser.train(config, objective(config, NoiseSchedulerSettings("ddpm")), examples(), tmp_path)


def test_a_checkpoint_of_another_objective_is_refused(tmp_path: Path) -> None:
    config = tiny()
    denoiser.train(config, objective(config, NoiseSchedulerSettings("ddpm")), examples(), tmp_path)
    again = denoiser.train(
        config, objective(config, NoiseSchedulerSettings("ddpm", solver="heun")), examples(), tmp_path
    )
    assert again.step == 16
    half = dataclasses.replace(config, dtype=Precision.bfloat16)
    with pytest.raises(ValueError, match="another objective"):
        denoiser.train(half, objective(half, NoiseSchedulerSettings("ddpm")), examples(), tmp_path)
