"""From a checkpoint that diffusers' QwenImagePipeline wrote, this engine generates that pipeline's images."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
)
from safetensors.torch import load_file

from harness.client.generator import DiffusionGenerator
from harness.pipeline.latents import seeded_noise
from harness.resolve.compose import compose_run
from harness.resolve.scheduler import noise_scheduler_settings
from models.checkpoint_source import CheckpointSource
from models.files import read_json
from models.qwen_image.prompts import load_qwen_image_prompts
from models.registry import PUBLISHED
from schedulers.build import build
from schedulers.published import from_diffusers
from tests.fixtures.generators import generator
from tests.fixtures.models.qwen_image import save

STEPS, GUIDANCE, SEED, TOKENS = 4, 4.0, 11, 40
HEIGHT, WIDTH = 48, 32
PROMPTS = ["a red fox", "the objects and background in color"]
NEGATIVE = " "
BOUND = 1e-4  # of pixels in [0, 1]; both run in float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen") / "checkpoint"
    save(folder)
    return folder


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> QwenImagePipeline:
    pipeline = QwenImagePipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[DiffusionGenerator]:
    model = ["model=qwen_image", f"model.path={checkpoint}", "model.dtype=float32", f"model.text.tokens={TOKENS}"]
    with generator(*model, "attention=math") as found:
        yield found


def generate(peer: QwenImagePipeline, prompt: str, seed: int, **changes: object) -> np.ndarray:
    """Return diffusers' image, channels first, from the noise that the engine uses for this seed."""
    requested = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "true_cfg_scale": GUIDANCE}
    requested |= {"negative_prompt": NEGATIVE} | changes
    height, width = requested["height"] // 4, requested["width"] // 4
    noise = seeded_noise(seed, (4, height, width))[None]
    packed = QwenImagePipeline._pack_latents(noise, 1, 4, height, width)
    found = peer(prompt, latents=packed, output_type="np", max_sequence_length=TOKENS, **requested)
    return found.images[0].transpose(2, 0, 1)


def images(engine: DiffusionGenerator, **changes: object) -> np.ndarray:
    requested = {"prompts": PROMPTS, "negative_prompt": NEGATIVE, "seed": SEED, "steps": STEPS, "guidance": GUIDANCE}
    requested |= {"height": HEIGHT, "width": WIDTH}
    return np.stack(engine.generate(**(requested | changes)).pixels)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_images_are_diffusers_own(engine: DiffusionGenerator, peer: QwenImagePipeline, batch_size: int) -> None:
    generated = images(engine, batch_size=batch_size)
    for k, prompt in enumerate(PROMPTS):
        theirs = generate(peer, prompt, SEED + k)
        assert theirs.std() > 0.05, "a flat picture proves nothing"
        assert ((theirs > 0) & (theirs < 1)).mean() > 0.5
        assert np.abs(generated[k] - theirs).max() < BOUND


def test_an_image_without_guidance_and_of_another_shape(engine: DiffusionGenerator, peer: QwenImagePipeline) -> None:
    generated = images(engine, prompts=PROMPTS[:1], guidance=1.0, height=32, width=80, steps=3)
    theirs = generate(peer, PROMPTS[0], SEED, true_cfg_scale=1.0, height=32, width=80, num_inference_steps=3)
    assert np.abs(generated[0] - theirs).max() < BOUND


def test_the_comparison_sees_the_fields_of_the_request(engine: DiffusionGenerator) -> None:
    """The result depends on every field of the request by far more than the bound."""
    plain = images(engine, prompts=PROMPTS[:1])
    changes = [{"prompts": PROMPTS[1:]}, {"guidance": 2.0}, {"seed": 12}, {"steps": 5}, {"negative_prompt": "shape"}]
    for change in changes:
        assert np.abs(images(engine, **({"prompts": PROMPTS[:1]} | change)) - plain).max() > 100 * BOUND, change


def test_a_long_prompt_is_truncated_where_diffusers_truncates_it(
    engine: DiffusionGenerator, peer: QwenImagePipeline
) -> None:
    prompt = "a red fox under a pale sky, " * 4
    generated = engine.generate(
        prompt=prompt, negative_prompt=NEGATIVE, seed=SEED, steps=2, guidance=GUIDANCE, height=HEIGHT, width=WIDTH
    )
    assert any(f"was truncated to {TOKENS}" in note for note in generated.record.notes)
    theirs = generate(peer, prompt, SEED, num_inference_steps=2)
    assert np.abs(generated.pixels[0] - theirs).max() < BOUND


def test_noise_in_the_order_of_diffusers(peer: QwenImagePipeline) -> None:
    """diffusers makes noise of (B, 1, C, H, W) and packs it; for one frame that is the state made here."""
    generated = peer.prepare_latents(1, 4, HEIGHT, WIDTH, torch.float32, "cpu", torch.Generator().manual_seed(SEED))
    noise = seeded_noise(SEED, (4, HEIGHT // 4, WIDTH // 4))[None]
    assert torch.equal(generated, QwenImagePipeline._pack_latents(noise, 1, 4, HEIGHT // 4, WIDTH // 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_text_states_are_diffusers_own(checkpoint: Path, dtype: torch.dtype) -> None:
    pipeline = QwenImagePipeline.from_pretrained(checkpoint, dtype=dtype)
    encoder = load_qwen_image_prompts(CheckpointSource(checkpoint, dtype=dtype, text_tokens=TOKENS))
    with torch.no_grad():
        ours = encoder(PROMPTS)
        for k, prompt in enumerate(PROMPTS):
            theirs, mask = pipeline.encode_prompt(prompt)
            assert mask is None
            length = encoder.count(prompt)
            assert theirs.shape[1] == length == ours.mask[k].sum()
            assert torch.equal(ours.prompt_embeds[k, :length], theirs[0])
            assert ours.prompt_embeds.dtype == dtype


def test_the_text_encoder_is_saved_under_the_hubs_names(checkpoint: Path) -> None:
    """Loading it equals loading the published files: the whole model, in names without language_model."""
    names = set(load_file(checkpoint / "text_encoder" / "model.safetensors"))
    hub = {"model.embed_tokens.weight", "visual.patch_embed.proj.weight", "visual.merger.ln_q.weight", "lm_head.weight"}
    assert hub <= names


def test_random_weights_need_neither_weights_nor_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    config = read_json(checkpoint / "text_encoder" / "config.json")
    config["text_config"] |= {"vocab_size": 152_064}
    (folder / "config.json").write_text(json.dumps(config))
    encoder = load_qwen_image_prompts(CheckpointSource(tmp_path, text_tokens=512, dummy=True))
    with torch.no_grad():
        prompt_embeds = encoder(["hi"]).prompt_embeds
    assert prompt_embeds.shape == (1, encoder.count("hi"), 32)
    assert prompt_embeds.isfinite().all()


def test_too_many_text_tokens_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="1024 or fewer"):
        load_qwen_image_prompts(CheckpointSource(checkpoint, text_tokens=1025))


@pytest.mark.parametrize("tokens", [256, 6889, 9000])
def test_the_facts_of_the_model_are_its_published_noise_scheduler(tokens: int) -> None:
    """scheduler=rectified_flow with the facts of conf/model walks the grid of scheduler_config.json."""
    file = PUBLISHED / "qwen_image" / "scheduler" / "scheduler_config.json"
    config = compose_run(["model=qwen_image", "model.load=dummy", "scheduler=rectified_flow"]).config
    ours = build(noise_scheduler_settings(config.scheduler)).grid(7, tokens)
    published = from_diffusers(file, even_sigmas=True).grid(7, tokens)
    theirs = FlowMatchEulerDiscreteScheduler.from_config(json.loads(file.read_text()))
    mu = 0.5 + (tokens - 256) * (0.9 - 0.5) / (8192 - 256)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 7, 7), mu=mu)
    for grid in (ours, published):
        torch.testing.assert_close(torch.tensor([p.sigma for p in grid]), theirs.sigmas, rtol=1e-6, atol=1e-6)
    assert theirs.sigmas[-2] == pytest.approx(0.02, rel=1e-5)
