"""A training that would fail after hours is refused before it starts, in one line and without torch."""

import dataclasses
from typing import Any

import pytest

from harness.config.train import TimeSampling, TrainConfig
from harness.resolve.training import check_training, time_sampling, trained_parts
from harness.tasks.train.objective import DEFAULTS
from schedulers import NoiseSchedulerSettings

FLOW, DDPM, SGM = (NoiseSchedulerSettings(family) for family in ("rectified_flow", "ddpm", "sgm"))


def changed(**values: Any) -> TrainConfig:
    """Return the default training with values changed; `denoiser__width` stands for train.denoiser.width."""
    config = TrainConfig()
    for key, value in values.items():
        *groups, name = key.split("__")
        node: Any = config
        for group in groups:
            node = getattr(node, group)
        setattr(node, name, value)
    return config


@pytest.mark.parametrize("settings", [FLOW, DDPM, SGM])
def test_the_default_training_of_every_family_is_accepted(settings: NoiseSchedulerSettings) -> None:
    check_training(TrainConfig(), settings)


@pytest.mark.parametrize(
    ("values", "settings", "line"),
    [
        ({}, None, "scheduler=published is a checkpoint's; train scheduler=rectified_flow, ddpm or sgm"),
        ({}, dataclasses.replace(SGM, prediction="score"), "a plain squared error on the score weights"),
        ({}, dataclasses.replace(DDPM, learned_variance=True), "the denoiser has no output for a learned variance"),
        ({"denoiser__times": TimeSampling.uniform}, SGM, "train.denoiser.times=uniform would sample almost no time"),
        ({"denoiser__ratio_mean": 1.0}, DDPM, "train.denoiser.ratio_mean and ratio_std have no effect"),
        ({}, dataclasses.replace(SGM, prediction="eps"), "no noise scheduler of diffusers is written for"),
        ({}, dataclasses.replace(DDPM, spacing="karras"), "diffusers' DDIM has no spacing=karras; export with"),
        ({"score__steps": 1001}, DDPM, "train.score.steps=1001: steps=1001 with spacing=leading on a path of 1000"),
        ({"denoiser__heads": 7}, FLOW, "train.denoiser.width=256 is not a multiple of train.denoiser.heads=7"),
        ({"denoiser__patch": 3}, FLOW, "train.denoiser.latent_size=16 is not a multiple of train.denoiser.patch=3"),
        ({"text__heads": 3}, FLOW, "train.text.width=256 is not a multiple of train.text.heads=3"),
        ({"vae__channels": [16, 30]}, FLOW, "train.vae.channels=[16, 30]; give one or more multiples of 8"),
        ({"vae__channels": []}, FLOW, "train.vae.channels=[]; give one or more multiples of 8"),
        ({"data__size": 30}, FLOW, "train.data.size=30 is not a multiple of 4 pixels"),
        ({"data__size": 32}, FLOW, "train.denoiser.latent_size=16, but train.data.size and train.vae.channels give 8"),
        ({"vae__latent_channels": 8}, FLOW, "train.denoiser.latent_channels=4, but train.vae.latent_channels give 8"),
        ({"text__width": 128}, FLOW, "train.denoiser.text_channels=256, but train.text.width gives 128; set it to 128"),
    ],
)  # fmt: skip
def test_what_would_fail_later_is_refused(
    values: dict[str, Any], settings: NoiseSchedulerSettings | None, line: str
) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        check_training(changed(**values), settings)
    assert str(caught.value).startswith(line)


def test_a_part_that_does_not_run_is_not_asked() -> None:
    check_training(changed(parts=["denoiser"], score__steps=9_999, vae__channels=[7]), DDPM)
    check_training(changed(parts=["data", "vae"], denoiser__heads=7), FLOW)


def test_parts_run_in_their_own_order() -> None:
    assert trained_parts(changed(parts=["export", "vae"])) == ["vae", "export"]


def test_times_are_sampled_as_the_objective_does() -> None:
    for path, default in DEFAULTS.items():
        family = {"flow": "rectified_flow", "discrete_vp": "ddpm"}.get(path, "sgm")
        assert time_sampling(TrainConfig().denoiser, NoiseSchedulerSettings(family, path=path)) is default.times.kind
