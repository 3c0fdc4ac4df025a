"""Triptych and diffusers' StableDiffusion3Pipeline generate the same images from the same checkpoint and noise."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from harness.client.generator import DiffusionGenerator
from harness.engines.protocol import RequestFailed
from harness.pipeline.latents import seeded_noise
from models.checkpoint_source import CheckpointSource
from models.files import CheckpointError
from models.sd3.prompts import load_sd3_prompts
from tests.fixtures.models.clip_t5_tiny import STRIDE, T5_TOKENS, engine
from tests.fixtures.models.sd3 import checkpoint

BOUND = 1e-4  # of pixels in [0, 1]; both run in float32
HEIGHT, WIDTH, SEED = 40, 24, 5
LONG = "a red fox under a blue sky with one white cloud, beside a green pear and a yellow lemon, in deep winter snow"
PROMPTS = ["fox", LONG]  # one that is padded, one that T5 and both CLIPs truncate
NEGATIVE = "blurry"


@dataclass(frozen=True)
class Case:
    """diffusers' pipeline of a checkpoint, Triptych's generator over the folder it was saved to, and the folder."""

    peer: StableDiffusion3Pipeline
    generator: DiffusionGenerator
    folder: Path


@pytest.fixture(scope="module", params=["3.5 medium", "3 without T5"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder, medium = tmp_path_factory.mktemp("sd3"), request.param == "3.5 medium"
    peer = checkpoint(folder, medium)
    sides = (f"model.height={HEIGHT}", f"model.width={WIDTH}")  # it has no positions for its usual ones
    with engine("sd35_medium" if medium else "sd3", folder, *sides) as generator:
        yield Case(peer, generator, folder)


def theirs(peer: StableDiffusion3Pipeline, prompt: str, seed: int, steps: int, guidance: float) -> Tensor:
    return peer(
        prompt,
        negative_prompt=NEGATIVE,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=HEIGHT,
        width=WIDTH,
        latents=seeded_noise(seed, (4, HEIGHT // STRIDE, WIDTH // STRIDE))[None],
        max_sequence_length=T5_TOKENS,
        output_type="pt",
    ).images[0]


def ours(generator: DiffusionGenerator, **changes: object) -> list[np.ndarray]:
    requested = {"prompts": PROMPTS, "negative_prompt": NEGATIVE, "seed": SEED, "height": HEIGHT, "width": WIDTH}
    return generator.generate(**(requested | changes)).pixels  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "guidance", "batch"), [(6, 4.5, 1), (6, 4.5, 2), (3, 1.0, 1)])
def test_images_are_diffusers_own(case: Case, steps: int, guidance: float, batch: int) -> None:
    generated = ours(case.generator, steps=steps, guidance=guidance, batch_size=batch)
    for k, prompt in enumerate(PROMPTS):
        image = theirs(case.peer, prompt, SEED + k, steps, guidance)
        assert image.std() > 0.01, "a flat picture proves nothing"
        assert np.abs(generated[k] - image.numpy()).max() < BOUND


def test_the_comparison_sees_every_field_of_the_request(case: Case) -> None:
    """The result depends on every field of the request by far more than the bound."""
    plain = ours(case.generator, steps=4, guidance=4.5)[0]
    for change in (
        {"prompts": ["pear", "pear"]},
        {"negative_prompt": "red"},
        {"guidance": 3.0},
        {"seed": SEED + 1},
        {"steps": 5},
    ):
        changed = ours(case.generator, **({"steps": 4, "guidance": 4.5} | change))[0]
        assert np.abs(changed - plain).max() > 20 * BOUND, change


def test_text_states_are_diffusers_own(case: Case) -> None:
    encoder = load_sd3_prompts(CheckpointSource(case.folder, text_tokens=T5_TOKENS), 40)
    with torch.no_grad():
        found = encoder(PROMPTS)
        prompt_embeds, _, pooled, _ = case.peer.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
    assert found.mask is None
    torch.testing.assert_close(found.require_prompt_embeds(), prompt_embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.require_pooled(), pooled, rtol=1e-5, atol=1e-5)
    assert (found.require_prompt_embeds()[:, 77:] == 0).all() == (case.peer.text_encoder_3 is None)


def test_an_image_beyond_the_positions_is_refused_before_it_runs(case: Case) -> None:
    with pytest.raises(RequestFailed, match="has positions for 52 per side"):
        ours(case.generator, steps=2, height=56)


def test_a_third_encoder_that_is_named_and_missing_is_refused(case: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(case.folder, tmp_path / "copy"))
    shutil.rmtree(folder / "text_encoder_3", ignore_errors=True)
    source = CheckpointSource(folder, text_tokens=T5_TOKENS)
    if case.peer.text_encoder_3 is None:
        assert load_sd3_prompts(source, 40).t5 is None
        return
    with pytest.raises(CheckpointError, match=r"names text_encoder_3, which is not here.*null"):
        load_sd3_prompts(source, 40)
    index = json.loads((folder / "model_index.json").read_text()) | {"text_encoder_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_sd3_prompts(source, 40).t5 is None
