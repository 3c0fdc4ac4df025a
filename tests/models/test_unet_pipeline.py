"""Whole checkpoints of the UNet families: this engine and diffusers' pipelines give the same image."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DiffusionPipeline,
    ScoreSdeVePipeline,
    UNet2DModel,
)
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.pipelines.deprecated.score_sde_ve import pipeline_score_sde_ve
from diffusers.schedulers import scheduling_ddpm, scheduling_sde_ve
from torch import Tensor

from harness.client.generator import DiffusionGenerator
from harness.engines.protocol import RequestFailed
from harness.pipeline.latents import seeded_noise, step_noise
from harness.resolve.compose import ConfigError, compose_run
from models.checkpoint_source import CheckpointSource
from models.files import CheckpointError
from models.unet.prompts import load_clip_prompts, load_two_clip_prompts
from tests.fixtures.models.unet import NCSNPP, PLAIN, network, scheduler_of, sd, sdxl

BOUND = 1e-4  # of pixels in [0, 1]; both run in float32
SEED, STEPS, GUIDANCE, HEIGHT, WIDTH = 11, 6, 4.0, 40, 72
PROMPTS = ["a red fox", "two small boats under a bridge"]
NEGATIVE = "blurry"
STRIDE = 4


PEERS = {
    "sd15": lambda: sd("sd15"),
    "sd21": lambda: sd("sd21"),
    "sdxl": sdxl,
    "sdxl, empty text encoded, channels of their own scale": lambda: sdxl(
        zeros=False, scaling_factor=0.5, latents_mean=[-1.6, 1.1, 3.1, -1.7], latents_std=[8.4, 5.9, 5.4, 5.9]
    ),
}


def engine_of(name: str, folder: Path, *overrides: str) -> DiffusionGenerator:
    common = ["model.dtype=float32", "launch.mode=inprocess", "launch.threads_per_rank=1", "logger=json"]
    composed = compose_run([f"model={name}", f"model.path={folder}", *common, "attention=math", *overrides])
    assert composed.notes == []
    from harness.engines.inprocess import InprocessEngine

    generator = DiffusionGenerator(composed, InprocessEngine(composed.config))
    generator.start()
    return generator


@pytest.fixture(scope="module", params=list(PEERS))
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, DiffusionPipeline, DiffusionGenerator]]:
    """Yield a checkpoint's name, diffusers' pipeline, and this engine over what that pipeline saved."""
    peer = PEERS[request.param]()
    peer.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("checkpoint")
    peer.save_pretrained(folder)
    engine = engine_of(request.param.partition(",")[0], folder)
    yield request.param, peer, engine
    engine.stop()


@torch.no_grad()
def theirs(peer: DiffusionPipeline, prompt: str, seed: int, negative: str | None, **changes: Any) -> Tensor:
    """Return diffusers' own image, (3, height, width), from this engine's noise."""
    requested = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": HEIGHT, "width": WIDTH} | changes
    noise = seeded_noise(seed, (4, requested["height"] // STRIDE, requested["width"] // STRIDE))[None]
    found = peer(prompt=prompt, negative_prompt=negative, latents=noise, output_type="pt", **requested)
    return found.images[0]


def ours(engine: DiffusionGenerator, **changes: Any) -> np.ndarray:
    requested = {"seed": SEED, "steps": STEPS, "guidance": GUIDANCE, "height": HEIGHT, "width": WIDTH} | changes
    return np.stack(engine.generate(**requested).pixels)


def apart(mine: np.ndarray, other: Tensor) -> float:
    assert mine.shape == tuple(other.shape)
    return float(np.abs(mine - other.numpy()).max())


def is_an_image(pixels: Tensor, inside: float = 0.5) -> bool:
    """Return whether the pixels are not flat, and not clamped in at least this share of the image."""
    return bool(pixels.std() > 0.03 and ((pixels > 0) & (pixels < 1)).float().mean() > inside)


def test_images_are_diffusers_own(both: tuple[str, DiffusionPipeline, DiffusionGenerator]) -> None:
    _, peer, engine = both
    generated = ours(engine, prompts=PROMPTS, negative_prompt=NEGATIVE)
    for k, prompt in enumerate(PROMPTS):
        expected = theirs(peer, prompt, SEED + k, NEGATIVE)
        assert is_an_image(expected)
        assert apart(generated[k], expected) < BOUND


def test_images_without_a_negative_prompt(both: tuple[str, DiffusionPipeline, DiffusionGenerator]) -> None:
    """diffusers takes an empty prompt for None, except where SDXL's checkpoint says otherwise."""
    name, peer, engine = both
    generated = ours(engine, prompt=PROMPTS[0], negative_prompt="")[0]
    expected = theirs(peer, PROMPTS[0], SEED, None)
    assert apart(generated, expected) < BOUND
    encoded = theirs(peer, PROMPTS[0], SEED, "")
    assert (apart(generated, encoded) > 20 * BOUND) == (name == "sdxl")


def test_images_without_guidance_and_of_another_shape(
    both: tuple[str, DiffusionPipeline, DiffusionGenerator],
) -> None:
    _, peer, engine = both
    generated = ours(engine, prompt=PROMPTS[1], guidance=1.0, height=64, width=32, steps=4)[0]
    changes = {"guidance_scale": 1.0, "height": 64, "width": 32, "num_inference_steps": 4}
    assert apart(generated, theirs(peer, PROMPTS[1], SEED, None, **changes)) < BOUND


def test_a_long_prompt_is_truncated_where_diffusers_truncates_it(
    both: tuple[str, DiffusionPipeline, DiffusionGenerator],
) -> None:
    _, peer, engine = both
    prompt = "a red fox and a green frog beside a yellow boat under a blue sky with a white cloud and one bird"
    generated = engine.generate(prompt=prompt, seed=SEED, steps=2, guidance=1.0, height=32, width=32)
    assert any("was truncated to 77" in note for note in generated.record.notes)
    changes = {"guidance_scale": 1.0, "height": 32, "width": 32, "num_inference_steps": 2}
    assert apart(generated.pixels[0], theirs(peer, prompt, SEED, None, **changes)) < BOUND


def test_the_comparison_sees_the_fields_of_the_request(both: tuple[str, DiffusionPipeline, DiffusionGenerator]) -> None:
    _, _, engine = both
    requested = {"prompt": PROMPTS[0], "negative_prompt": NEGATIVE}
    plain = ours(engine, **requested)[0]
    for change in (
        {"prompt": PROMPTS[1]},
        {"negative_prompt": "a red fox"},
        {"guidance": 3.0},
        {"seed": SEED + 1},
        {"steps": STEPS + 1},
    ):
        assert np.abs(ours(engine, **(requested | change))[0] - plain).max() > 20 * BOUND, change


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_times_that_the_network_gets_are_diffusers_own(name: str, tmp_path: Path) -> None:
    peer = PEERS[name]()
    peer.save_pretrained(tmp_path)
    source = CheckpointSource(tmp_path, "unet", text_tokens=77)
    if name == "sd15":
        prompt, negative = peer.encode_prompt(PROMPTS[0], "cpu", 1, True, NEGATIVE)
        found = load_clip_prompts(source)([PROMPTS[0], NEGATIVE])
        assert found.pooled is None
    else:
        prompt, negative, pooled, away = peer.encode_prompt(PROMPTS[0], device="cpu", negative_prompt=NEGATIVE)
        encoder = load_two_clip_prompts(source)
        found = encoder([PROMPTS[0], NEGATIVE])
        torch.testing.assert_close(found.pooled, torch.cat([pooled, away]), rtol=1e-5, atol=1e-5)
        empty = encoder([""], negative=True)
        assert not empty.require_prompt_embeds().any()
        assert empty.pooled is not None
        assert not empty.pooled.any()
        assert encoder([""]).require_prompt_embeds().any()
    torch.testing.assert_close(found.require_prompt_embeds(), torch.cat([prompt, negative]), rtol=1e-5, atol=1e-5)
    assert found.mask is None


def test_more_tokens_than_an_encoder_has_positions_for(tmp_path: Path) -> None:
    sd("sd15").save_pretrained(tmp_path)
    assert load_clip_prompts(CheckpointSource(tmp_path, "unet", text_tokens=9))(
        ["a"]
    ).require_prompt_embeds().shape == (1, 9, 12)
    with pytest.raises(CheckpointError, match="78 tokens, but this encoder takes 77"):
        load_clip_prompts(CheckpointSource(tmp_path, "unet", text_tokens=78))


def test_other_solvers_run_on_the_facts_of_training(tmp_path: Path) -> None:
    """scheduler=ddpm with DDIM's solver, spacing and end is the published DDIM of a v-prediction checkpoint."""
    sd("sd21").save_pretrained(tmp_path)
    engine = engine_of("sd21", tmp_path)
    expected = ours(engine, prompt=PROMPTS[0])
    engine.stop()
    same = ["scheduler.spacing=leading", "scheduler.steps_offset=1", "scheduler.end=t_min"]
    engine = engine_of("sd21", tmp_path, "scheduler=ddpm", "scheduler/solver=ddim", *same)
    assert np.abs(ours(engine, prompt=PROMPTS[0]) - expected).max() < BOUND
    engine.stop()


# ---------------------------------------------------------------- without a prompt


def fed(monkeypatch: pytest.MonkeyPatch, modules: list[Any], samples: list[Tensor]) -> None:
    """Give diffusers' pipeline and scheduler this engine's noise, in the order of their calls."""
    left = iter(samples)

    def sample_noise(shape: tuple[int, ...], **_: object) -> Tensor:
        return next(left).reshape(shape)

    for module in modules:
        monkeypatch.setattr(module, "randn_tensor", sample_noise)


SIDE = 16
SHAPE = (3, SIDE, SIDE)


def ddpm(monkeypatch: pytest.MonkeyPatch, peer: DDPMPipeline, seed: int, steps: int) -> np.ndarray:
    """One noise to begin with, and one for each step but the last."""
    samples = [seeded_noise(seed, SHAPE), *(step_noise(seed, i, SHAPE) for i in range(steps - 1))]
    fed(monkeypatch, [pipeline_ddpm, scheduling_ddpm], samples)
    return peer(num_inference_steps=steps, output_type="pt").images.numpy()


def score(monkeypatch: pytest.MonkeyPatch, peer: ScoreSdeVePipeline, seed: int, steps: int) -> np.ndarray:
    """One noise to begin with, and two a step: for the correction (numbered after all steps) and for the prediction."""
    order = [number for i in range(steps) for number in (i + steps, i)]
    samples = [seeded_noise(seed, SHAPE), *(step_noise(seed, number, SHAPE) for number in order)]
    fed(monkeypatch, [pipeline_score_sde_ve, scheduling_sde_ve], samples)
    return peer(num_inference_steps=steps, output_type="np").images.transpose(0, 3, 1, 2)


def plain(name: str) -> tuple[DiffusionPipeline, Any]:
    """Return a checkpoint without a prompt, and how diffusers generates noise for it."""
    if name == "ddpm_cifar10":
        return DDPMPipeline(network(UNet2DModel, PLAIN), scheduler_of(name)), ddpm
    # random scores do not lead from 380 back to images, so the tiny network starts within their range
    return ScoreSdeVePipeline(network(UNet2DModel, NCSNPP), scheduler_of(name, sigma_max=0.8)), score


@pytest.mark.parametrize("layout", ["folders", "flat"])
@pytest.mark.parametrize("name", ["ddpm_cifar10", "ncsnpp_church"])
def test_images_without_a_prompt_are_diffusers_own(
    name: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, sample_noise = plain(name)
    peer.set_progress_bar_config(disable=True)
    peer.save_pretrained(tmp_path)
    if layout == "flat":  # as these were published, before components had folders
        for folder in ("unet", "scheduler"):
            for file in (tmp_path / folder).iterdir():
                shutil.move(file, tmp_path / file.name)
            (tmp_path / folder).rmdir()
    engine = engine_of(name, tmp_path, "model.size_multiple=4")

    def mine(seed: int = SEED, steps: int = 7) -> np.ndarray:
        return np.stack(engine.generate(prompts=["", ""], seed=seed, steps=steps, height=SIDE, width=SIDE).pixels)

    generated = mine()
    for k in range(2):
        expected = sample_noise(monkeypatch, peer, SEED + k, 7)
        assert is_an_image(torch.from_numpy(expected), inside=0.25)
        assert apart(generated[k : k + 1], torch.from_numpy(expected)) < BOUND
    assert np.abs(mine(seed=SEED + 1)[:1] - generated[:1]).max() > 20 * BOUND
    assert np.abs(mine(steps=8) - generated).max() > 20 * BOUND
    with pytest.raises(RequestFailed, match="takes no prompt, but got 'a fox'"):
        engine.generate(prompt="a fox", seed=SEED, steps=2, height=SIDE, width=SIDE)
    with pytest.raises(RequestFailed, match="no guidance; set it to 1"):
        engine.generate(prompt="", guidance=2.0, seed=SEED, steps=2, height=SIDE, width=SIDE)
    engine.stop()


def test_a_flat_folder_of_another_network_is_refused(tmp_path: Path) -> None:
    plain("ddpm_cifar10")[0].unet.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"one component \(UNet2DModel\), not a checkpoint of UNet2DConditionModel"):
        compose_run(["model=sd15", f"model.path={tmp_path}"])
    with pytest.raises(ConfigError, match=r"scheduler_config\.json: not there"):
        compose_run(["model=ddpm_cifar10", f"model.path={tmp_path}"])
