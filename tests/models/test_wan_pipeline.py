"""The oracle for Wan: this engine and diffusers' WanPipeline give the same video from the same checkpoint and noise."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

from harness.client.generator import DiffusionGenerator
from harness.pipeline.latents import seeded_noise
from models.checkpoint_source import CheckpointSource
from models.wan.prompts import load_umt5_prompts
from tests.fixtures.generators import generator
from tests.fixtures.models.wan import OVERRIDES, TOKENS, tiny_wan

BOUND = 1e-4  # of pixels in [0, 1]; both run in float32
PROMPTS = ["a red fox", "  two  &amp; a half\nowls "]
LONG = "a red fox beside a green owl and a yellow canary under a blue sky"
REQUESTED: dict[str, Any] = {"negative_prompt": "blurry", "seed": 11, "steps": 5, "guidance": 4.0}


@pytest.fixture(scope="module")
def peer() -> WanPipeline:
    return tiny_wan()


@pytest.fixture(scope="module")
def checkpoint(peer: WanPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    peer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[DiffusionGenerator]:
    with generator(*OVERRIDES, f"model.path={checkpoint}", "attention=math") as found:
        yield found


def generate(
    peer: WanPipeline, prompt: str, seed: int, height: int, width: int, frames: int, **requested: Any
) -> Tensor:
    """Run diffusers' whole pipeline from the engine's noise; return (frames, 3, height, width)."""
    noise = seeded_noise(seed, (4, (frames - 1) // 4 + 1, height // 4, width // 4))[None]
    video = peer(
        prompt,
        requested["negative_prompt"],
        height,
        width,
        frames,
        requested["steps"],
        requested["guidance"],
        latents=noise,
        max_sequence_length=TOKENS,
        output_type="pt",
    ).frames[0]
    assert video.std() > 0.01, "a flat video proves nothing"
    assert frames == 1 or (video[1:] - video[:-1]).abs().max() > 0.05, "a still proves nothing of time"
    return video


def apart(ours: np.ndarray, theirs: Tensor) -> float:
    assert ours.shape == tuple(theirs.shape)
    return float(np.abs(ours - theirs.numpy()).max())


def test_videos_are_diffusers_own(engine: DiffusionGenerator, peer: WanPipeline) -> None:
    generated = engine.generate(prompts=PROMPTS, batch_size=2, height=32, width=48, frames=9, **REQUESTED)
    for k, prompt in enumerate(PROMPTS):
        theirs = generate(peer, prompt, height=32, width=48, frames=9, **(REQUESTED | {"seed": REQUESTED["seed"] + k}))
        assert apart(generated.pixels[k], theirs) < BOUND


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance": 1.0},
        {"steps": 1},
        {"steps": 9, "frames": 5},
        {"height": 48, "width": 16, "frames": 13},
        {"negative_prompt": ""},
    ],
    ids=str,
)
def test_other_requests_are_diffusers_own(
    engine: DiffusionGenerator, peer: WanPipeline, changes: dict[str, Any]
) -> None:
    requested = REQUESTED | {"height": 16, "width": 32, "frames": 9} | changes
    theirs = generate(peer, PROMPTS[0], **requested)
    ours = engine.generate(prompt=PROMPTS[0], **requested)
    assert apart(ours.pixels[0], theirs) < BOUND


def test_one_frame_is_an_image(engine: DiffusionGenerator, peer: WanPipeline) -> None:
    requested = REQUESTED | {"height": 32, "width": 16, "frames": 1}
    generated = engine.generate(prompt=PROMPTS[0], **requested)
    assert generated.pixels[0].shape == (3, 32, 16)
    assert len(generated.images) == 1
    assert generated.videos == []
    assert apart(generated.pixels[0], generate(peer, PROMPTS[0], **requested)[0]) < BOUND


def test_a_long_prompt_is_truncated_where_diffusers_truncates_it(engine: DiffusionGenerator, peer: WanPipeline) -> None:
    requested = REQUESTED | {"height": 16, "width": 16, "frames": 5, "steps": 2}
    generated = engine.generate(prompt=LONG, **requested)
    assert any(
        f"a prompt of {len(LONG) + 1} tokens was truncated to {TOKENS}" in note for note in generated.record.notes
    )
    assert apart(generated.pixels[0], generate(peer, LONG, **requested)) < BOUND


def test_the_comparison_sees_every_field_of_the_request(engine: DiffusionGenerator) -> None:
    """The result depends on every field of the request by far more than the bound."""
    requested = REQUESTED | {"prompt": PROMPTS[0], "height": 16, "width": 32, "frames": 9}
    plain = engine.generate(**requested).pixels[0]
    changes = [{"prompt": "an owl"}, {"negative_prompt": "red"}, {"guidance": 2.0}, {"seed": 12}, {"steps": 4}]
    for change in changes:
        assert np.abs(engine.generate(**(requested | change)).pixels[0] - plain).max() > 20 * BOUND, change


def test_text_states_are_diffusers_own(peer: WanPipeline, checkpoint: Path) -> None:
    encoder = load_umt5_prompts(CheckpointSource(checkpoint, text_tokens=TOKENS))
    for prompt in (*PROMPTS, LONG, ""):
        with torch.no_grad():
            prompt_embeds, _ = peer.encode_prompt(prompt, None, False, max_sequence_length=TOKENS)
            ours = encoder([prompt])
        assert ours.mask is None
        torch.testing.assert_close(ours.prompt_embeds, prompt_embeds, rtol=1e-6, atol=1e-6)
        padding = ours.prompt_embeds[0, encoder.count(prompt) :]
        assert padding.shape[0] == max(0, TOKENS - encoder.count(prompt))
        assert not padding.any()


def test_the_noise_scheduler_is_the_checkpoints(engine: DiffusionGenerator, peer: WanPipeline) -> None:
    """The published shift of 3 is used: with another shift the video is another one."""
    requested = REQUESTED | {"height": 16, "width": 16, "frames": 5}
    ours = engine.generate(prompt=PROMPTS[0], **requested).pixels[0]
    other = peer.scheduler.from_config(peer.scheduler.config, flow_shift=5.0)
    shifted = WanPipeline(**(peer.components | {"scheduler": other}))
    shifted.set_progress_bar_config(disable=True)
    assert apart(ours, generate(peer, PROMPTS[0], **requested)) < BOUND
    assert apart(ours, generate(shifted, PROMPTS[0], **requested)) > 20 * BOUND
