"""From a checkpoint that diffusers' ZImagePipeline wrote, this engine generates that pipeline's images."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from harness.client.generator import DiffusionGenerator
from harness.pipeline.latents import seeded_noise
from harness.resolve.compose import compose_run
from harness.resolve.scheduler import noise_scheduler_settings
from models.checkpoint_source import CheckpointSource
from models.files import CheckpointError, read_json
from models.registry import PUBLISHED
from models.z_image.prompts import load_z_image_prompts
from schedulers.build import build
from schedulers.published import from_diffusers
from tests.fixtures.generators import generator
from tests.fixtures.models.z_image import save

STEPS, GUIDANCE, SEED, TOKENS = 4, 4.0, 11, 48  # guidance is counted from 1 here, from 0 by diffusers
HEIGHT, WIDTH = 48, 32
PROMPTS = ["a red fox", "the objects and background in color " * 2]
NEGATIVE = "shape"
BOUND = 1e-4  # of pixels in [0, 1]; both run in float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("z") / "checkpoint"
    save(folder)
    return folder


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> ZImagePipeline:
    pipeline = ZImagePipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[DiffusionGenerator]:
    model = ["model=z_image_turbo", f"model.path={checkpoint}", "model.dtype=float32", f"model.text.tokens={TOKENS}"]
    with generator(*model, "attention=math") as found:
        yield found


def generate(peer: ZImagePipeline, prompt: str, seed: int, **changes: object) -> np.ndarray:
    """Return diffusers' image, channels first, from the noise that the engine uses for this seed."""
    requested = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE - 1}
    requested |= {"negative_prompt": NEGATIVE} | changes
    noise = seeded_noise(seed, (4, requested["height"] // 2, requested["width"] // 2))[None]
    found = peer(prompt, latents=noise, output_type="np", max_sequence_length=TOKENS, **requested)
    return found.images[0].transpose(2, 0, 1)


def images(engine: DiffusionGenerator, **changes: object) -> np.ndarray:
    requested = {"prompts": PROMPTS, "negative_prompt": NEGATIVE, "seed": SEED, "steps": STEPS, "guidance": GUIDANCE}
    requested |= {"height": HEIGHT, "width": WIDTH}
    return np.stack(engine.generate(**(requested | changes)).pixels)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_images_are_diffusers_own(engine: DiffusionGenerator, peer: ZImagePipeline, batch_size: int) -> None:
    generated = images(engine, batch_size=batch_size)
    for k, prompt in enumerate(PROMPTS):
        theirs = generate(peer, prompt, SEED + k)
        assert theirs.std() > 0.05, "a flat picture proves nothing"
        assert ((theirs > 0) & (theirs < 1)).mean() > 0.5
        assert np.abs(generated[k] - theirs).max() < BOUND


def test_an_image_without_guidance_and_of_another_shape(engine: DiffusionGenerator, peer: ZImagePipeline) -> None:
    """Z-Image-Turbo as it is published: its guidance_scale 0 is 1 here."""
    generated = images(engine, prompts=PROMPTS[:1], guidance=1.0, height=32, width=80, steps=3)
    theirs = generate(peer, PROMPTS[0], SEED, guidance_scale=0.0, height=32, width=80, num_inference_steps=3)
    assert np.abs(generated[0] - theirs).max() < BOUND


def test_an_empty_negative_prompt(engine: DiffusionGenerator, peer: ZImagePipeline) -> None:
    generated = images(engine, prompts=PROMPTS[:1], negative_prompt="")
    assert np.abs(generated[0] - generate(peer, PROMPTS[0], SEED, negative_prompt=None)).max() < BOUND


def test_the_comparison_sees_the_fields_of_the_request(engine: DiffusionGenerator) -> None:
    """The result depends on every field of the request by far more than the bound."""
    plain = images(engine, prompts=PROMPTS[:1])
    changes = [{"prompts": PROMPTS[1:]}, {"guidance": 2.0}, {"seed": 12}, {"steps": 5}, {"negative_prompt": "a red"}]
    for change in changes:
        moved = np.abs(images(engine, **({"prompts": PROMPTS[:1]} | change)) - plain).max()
        assert moved > 100 * BOUND, change


def test_a_long_prompt_is_truncated_where_diffusers_truncates_it(
    engine: DiffusionGenerator, peer: ZImagePipeline
) -> None:
    prompt = "a red fox under a pale sky, " * 4
    generated = engine.generate(
        prompt=prompt, negative_prompt=NEGATIVE, seed=SEED, steps=2, guidance=GUIDANCE, height=HEIGHT, width=WIDTH
    )
    assert any(f"was truncated to {TOKENS}" in note for note in generated.record.notes)
    theirs = generate(peer, prompt, SEED, num_inference_steps=2)
    assert np.abs(generated.pixels[0] - theirs).max() < BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_text_states_are_diffusers_own(checkpoint: Path, dtype: torch.dtype) -> None:
    pipeline = ZImagePipeline.from_pretrained(checkpoint, dtype=dtype)
    encoder = load_z_image_prompts(CheckpointSource(checkpoint, dtype=dtype, text_tokens=TOKENS))
    bound = 1e-5 if dtype is torch.float32 else 0.02  # diffusers pads, which sums in another order
    with torch.no_grad():
        ours = encoder(PROMPTS)
        for k, prompt in enumerate(PROMPTS):
            theirs = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=TOKENS)[0][0]
            length = encoder.count(prompt)
            assert len(theirs) == length == ours.mask[k].sum()
            prompt_embeds = ours.prompt_embeds[k, :length]
            assert (prompt_embeds - theirs).float().norm() < bound * theirs.float().norm()
            assert ours.prompt_embeds.dtype == dtype


def test_a_checkpoint_of_the_whole_language_model_loads(checkpoint: Path, tmp_path: Path) -> None:
    """The hub's text_encoder/ was saved from Qwen3ForCausalLM with tied words: names begin with model."""
    whole = Qwen3ForCausalLM(Qwen3Config.from_pretrained(checkpoint / "text_encoder", tie_word_embeddings=True))
    whole.model.load_state_dict(Qwen3Model.from_pretrained(checkpoint / "text_encoder").state_dict())
    whole.save_pretrained(tmp_path)
    plain = load_z_image_prompts(CheckpointSource(checkpoint, text_tokens=TOKENS))(PROMPTS)
    replaced = load_z_image_prompts(
        CheckpointSource(checkpoint, text_tokens=TOKENS, replaced={"text_encoder": tmp_path})
    )(PROMPTS)
    assert torch.equal(plain.prompt_embeds, replaced.prompt_embeds)


def test_a_tokenizer_without_a_chat_template_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template here"):
        load_z_image_prompts(CheckpointSource(folder, text_tokens=TOKENS))


def test_random_weights_need_neither_weights_nor_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    """A stand-in tokenizer has the published ids of the special tokens, one token a byte, and ChatML."""
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    config = read_json(checkpoint / "text_encoder" / "config.json") | {"vocab_size": 151_936}
    (folder / "config.json").write_text(json.dumps(config))
    encoder = load_z_image_prompts(CheckpointSource(tmp_path, text_tokens=TOKENS, dummy=True))
    said = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = encoder.tokenizer(said).input_ids
    assert encoder.count("hi") == len(ids) == len("|user.hi|.|assistant.")
    assert [n for n in ids if n > 255] == [151_644, 151_645, 151_644]
    with torch.no_grad():
        prompt_embeds = encoder(["hi"]).prompt_embeds
    assert prompt_embeds.shape == (1, len(ids), 32)
    assert prompt_embeds.isfinite().all()


@pytest.mark.parametrize("name", ["z_image_turbo", "z_image"])
def test_the_facts_of_the_model_are_its_published_noise_scheduler(name: str) -> None:
    """scheduler=rectified_flow with the facts of conf/model walks the grid of scheduler_config.json."""
    file = PUBLISHED / name / "scheduler" / "scheduler_config.json"
    config = compose_run([f"model={name}", "model.load=dummy", "scheduler=rectified_flow"]).config
    ours = build(noise_scheduler_settings(config.scheduler)).grid(8, 4096)
    published = from_diffusers(file, even_sigmas=True).grid(8, 4096)
    theirs = FlowMatchEulerDiscreteScheduler.from_config(json.loads(file.read_text()))
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))
    for grid in (ours, published):
        torch.testing.assert_close(grid.sigma.float(), theirs.sigmas, rtol=1e-6, atol=1e-6)
