"""PixArt-alpha and PixArt-Sigma checkpoints saved by diffusers give diffusers' images, from words to pixels."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
)

from harness.client.generator import DiffusionGenerator
from harness.pipeline.latents import seeded_noise
from models.attention import sdpa_attention
from models.checkpoint_source import CheckpointSource
from models.pixart.components import load
from models.registry import REFERENCE
from models.text.load import load_tokenizer
from models.text.t5 import load_t5_prompts
from tests.fixtures.generators import generator
from tests.fixtures.models.pixart import PIPELINES, save

BOUND = 1e-4  # of pixels in [0, 1]; both run in float32
STEPS, GUIDANCE, SEED, TOKENS = 6, 4.5, 11, 20
PROMPTS = ["  A Red Apple ", "rocket"]
NEGATIVE = "Blurry"
REQUESTED = {"negative_prompt": NEGATIVE, "steps": STEPS, "guidance": GUIDANCE, "height": 32, "width": 32}


@dataclass(frozen=True)
class Both:
    """One checkpoint in both libraries."""

    name: str
    folder: Path
    peer: PixArtAlphaPipeline | PixArtSigmaPipeline
    engine: DiffusionGenerator


def start(folder: Path, name: str, *overrides: str) -> DiffusionGenerator:
    model = [f"model={name}", f"model.path={folder}", "model.dtype=float32", "model.size_multiple=4"]
    engine = generator(*model, f"model.text.tokens={TOKENS}", *overrides)
    engine.start()
    return engine


@pytest.fixture(scope="module", params=list(PIPELINES))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp(request.param)
    save(folder, request.param)
    kind = PIPELINES[request.param][0]
    peer = kind.from_pretrained(folder, dtype=torch.float32, low_cpu_mem_usage=False)
    peer.set_progress_bar_config(disable=True)
    engine = start(folder, request.param)
    yield Both(request.param, folder, peer, engine)
    engine.stop()


def generate(both: Both, prompt: str, seed: int, **changes: Any) -> np.ndarray:
    """Run diffusers' own pipeline with this harness's noise."""
    requested = REQUESTED | changes
    height, width = requested["height"], requested["width"]
    images = both.peer(
        prompt,
        requested["negative_prompt"],
        num_inference_steps=requested["steps"],
        guidance_scale=requested["guidance"],
        height=height,
        width=width,
        latents=seeded_noise(seed, (4, height // 2, width // 2))[None],
        output_type="np",
        clean_caption=False,
        use_resolution_binning=False,
        max_sequence_length=TOKENS,
    ).images
    return images[0].transpose(2, 0, 1)


def test_images_are_diffusers_own(both: Both) -> None:
    generated = both.engine.generate(prompts=PROMPTS, seed=SEED, **REQUESTED)
    for k, prompt in enumerate(PROMPTS):
        theirs = generate(both, prompt, SEED + k)
        assert theirs.std() > 0.05, "a flat picture proves nothing"
        assert np.abs(generated.pixels[k] - theirs).max() < BOUND


@pytest.mark.parametrize("size", [(48, 24), (24, 40)])
def test_an_image_of_another_shape_without_guidance(both: Both, size: tuple[int, int]) -> None:
    changes = {"guidance": 1.0, "steps": 3, "height": size[0], "width": size[1]}
    generated = both.engine.generate(prompts=PROMPTS, seed=SEED, batch_size=2, **(REQUESTED | changes))
    for k, prompt in enumerate(PROMPTS):
        assert np.abs(generated.pixels[k] - generate(both, prompt, SEED + k, **changes)).max() < BOUND


def test_a_long_prompt_is_truncated_where_diffusers_truncates_it(both: Both) -> None:
    prompt = "A Red Apple beside a green pear and a yellow lemon"
    generated = both.engine.generate(prompt=prompt, seed=SEED, **REQUESTED)
    assert any(f"was truncated to {TOKENS}" in note for note in generated.record.notes)
    assert np.abs(generated.pixels[0] - generate(both, prompt, SEED)).max() < BOUND


def test_the_comparison_sees_the_fields_of_the_request(both: Both) -> None:
    def pixels(**changes: Any) -> np.ndarray:
        return both.engine.generate(**({"prompt": PROMPTS[0], "seed": SEED} | REQUESTED | changes)).pixels[0]

    plain = pixels()
    changes = [{"prompt": "rocket"}, {"guidance": 2.0}, {"seed": 12}, {"steps": 7}, {"negative_prompt": "red"}]
    for change in changes:
        assert np.abs(pixels(**change) - plain).max() > 20 * BOUND, change
    assert np.array_equal(pixels(prompt="a red apple", negative_prompt="blurry "), plain)


def test_only_the_network_of_1024_pixels_gets_sizes(both: Both) -> None:
    """The size counts the latent's pixels and the decoder's stride; diffusers' pipeline counts in image pixels too."""
    parts = load(CheckpointSource(both.folder, text_tokens=TOKENS), sdpa_attention)
    assert parts.network.config.size_conditioning is (both.name == "pixart_alpha")
    assert (parts.network.config.stride, parts.size_multiple, parts.learned_variance) == (2, 4, True)


def test_the_learned_variance_of_a_text_model_is_used(both: Both) -> None:
    """With DDPM's solver, whose image differs from that of a fixed variance."""
    images = []
    for variance in ("learned_range", "small"):
        ddpm = ["scheduler=ddpm", "scheduler/solver=ddpm", f"scheduler.solver.variance={variance}"]
        engine = start(both.folder, both.name, *ddpm, "scheduler.spacing=leading")
        images.append(engine.generate(prompt="rocket", seed=SEED, **(REQUESTED | {"steps": 4})).pixels[0])
        engine.stop()
    assert np.isfinite(images[0]).all()
    assert np.abs(images[0] - images[1]).max() > 20 * BOUND


def test_lower_case_is_what_the_reference_tokenizer_makes_of_a_prompt_anyway() -> None:
    """The built-in model, which is loaded by the same code, still gives the same images."""
    source = CheckpointSource(REFERENCE / "emoji", text_tokens=24)
    tokenizer = load_tokenizer(source, "tokenizer")
    names = (REFERENCE / "emoji" / "vocabulary.txt").read_text().splitlines()
    for prompt in [*names, "  Red Apple, 3D ", "ROCKET", "Ünïcode CAFÉ", ""]:
        assert tokenizer(prompt).input_ids == tokenizer(prompt.lower().strip()).input_ids, prompt
    with torch.no_grad():
        plain, lower = (load_t5_prompts(source, lowercase)(["  Red Apple, 3D "]) for lowercase in (False, True))
    assert torch.equal(plain.require_prompt_embeds(), lower.require_prompt_embeds())
