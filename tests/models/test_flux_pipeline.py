"""Triptych and diffusers' FluxPipeline generate the same images from the same saved checkpoint and noise."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from harness.client.generator import DiffusionGenerator
from harness.pipeline.latents import seeded_noise
from models.checkpoint_source import CheckpointSource
from models.flux.prompts import load_flux_prompts
from tests.fixtures.models.clip_t5_tiny import STRIDE, T5_TOKENS, engine
from tests.fixtures.models.flux import checkpoint

BOUND = 1e-4  # of pixels in [0, 1]; both run in float32
HEIGHT, WIDTH, SEED = 40, 24, 5
LONG = "a red fox under a blue sky with one white cloud, beside a green pear and a yellow lemon, in deep winter snow"
PROMPTS = ["fox", LONG]  # one that is padded, one that both encoders truncate
NEGATIVE = "blurry"


@dataclass(frozen=True)
class Case:
    """diffusers' pipeline of a checkpoint, Triptych's generator over the folder it was saved to, and the folder."""

    peer: FluxPipeline
    generator: DiffusionGenerator
    folder: Path


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("dev")
    peer = checkpoint(folder, distilled=True)
    with engine("flux", folder) as generator:
        yield Case(peer, generator, folder)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("schnell")
    peer = checkpoint(folder, distilled=False)
    with engine("flux_schnell", folder) as generator:
        yield Case(peer, generator, folder)


def theirs(
    peer: FluxPipeline, prompt: str, seed: int, steps: int, embedded_guidance: float, guided: float = 1.0
) -> Tensor:
    """Return diffusers' image; `guided` is the scale of classifier-free guidance."""
    height, width = HEIGHT // STRIDE, WIDTH // STRIDE
    noise = FluxPipeline._pack_latents(seeded_noise(seed, (4, height, width))[None], 1, 4, height, width)
    return peer(
        prompt,
        negative_prompt=NEGATIVE,
        true_cfg_scale=guided,
        num_inference_steps=steps,
        guidance_scale=embedded_guidance,
        height=HEIGHT,
        width=WIDTH,
        latents=noise,
        max_sequence_length=T5_TOKENS,
        output_type="pt",
    ).images[0]


def ours(generator: DiffusionGenerator, **changes: object) -> list[np.ndarray]:
    requested = {"prompts": PROMPTS, "negative_prompt": NEGATIVE, "seed": SEED, "height": HEIGHT, "width": WIDTH}
    return generator.generate(**(requested | changes)).pixels  # type: ignore[arg-type]


def apart(generated: np.ndarray, image: Tensor) -> float:
    assert image.std() > 0.01, "a flat picture proves nothing"
    return float(np.abs(generated - image.numpy()).max())


@pytest.mark.parametrize(("steps", "guidance", "batch"), [(6, 3.5, 1), (6, 3.5, 2), (3, 1.0, 1)])
def test_images_of_a_distilled_network_are_diffusers_own(dev: Case, steps: int, guidance: float, batch: int) -> None:
    generated = ours(dev.generator, steps=steps, guidance=guidance, batch_size=batch)
    for k, prompt in enumerate(PROMPTS):
        assert apart(generated[k], theirs(dev.peer, prompt, SEED + k, steps, guidance)) < BOUND


@pytest.mark.parametrize(("steps", "guidance"), [(4, 1.0), (4, 2.5)])
def test_images_of_schnell_are_diffusers_own(schnell: Case, steps: int, guidance: float) -> None:
    """Guidance is classifier-free where the network has no embedded scale."""
    generated = ours(schnell.generator, steps=steps, guidance=guidance)
    for k, prompt in enumerate(PROMPTS):
        assert apart(generated[k], theirs(schnell.peer, prompt, SEED + k, steps, 0.0, guided=guidance)) < BOUND


def test_the_comparison_sees_every_field_of_the_request(dev: Case, schnell: Case) -> None:
    """The result depends on every field of the request by far more than the bound."""
    of_both = ({"prompts": ["pear", "pear"]}, {"guidance": 2.0}, {"seed": SEED + 1}, {"steps": 5})
    for case, changes in ((dev, of_both), (schnell, (*of_both, {"negative_prompt": "red"}))):
        plain = ours(case.generator, steps=4, guidance=3.5)[0]
        for change in changes:
            changed = ours(case.generator, **({"steps": 4, "guidance": 3.5} | change))[0]
            assert np.abs(changed - plain).max() > 20 * BOUND, change


def test_a_distilled_network_has_no_negative_branch(dev: Case) -> None:
    plain, other = (
        dev.generator.generate(
            prompt="fox", negative_prompt=text, seed=SEED, steps=2, guidance=3.5, height=HEIGHT, width=WIDTH
        )
        for text in (NEGATIVE, "red")
    )
    assert np.array_equal(plain.pixels[0], other.pixels[0])


def test_text_states_are_diffusers_own(dev: Case) -> None:
    encoder = load_flux_prompts(CheckpointSource(dev.folder, text_tokens=T5_TOKENS))
    with torch.no_grad():
        found = encoder(PROMPTS)
        prompt_embeds, pooled, _ = dev.peer.encode_prompt(PROMPTS, max_sequence_length=T5_TOKENS)
    assert found.mask is None
    torch.testing.assert_close(found.require_prompt_embeds(), prompt_embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.require_pooled(), pooled, rtol=1e-5, atol=1e-5)


def test_a_truncated_prompt_is_noted(dev: Case) -> None:
    generated = dev.generator.generate(
        prompt=f"{LONG}, again", seed=SEED, steps=1, guidance=3.5, height=HEIGHT, width=WIDTH
    )
    assert any(f"was truncated to {T5_TOKENS}" in note for note in generated.record.notes)
