"""The oracle: this engine and diffusers' own components give the same image from the same folder and noise."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtSigmaPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.client.generator import DiffusionGenerator
from harness.config.schema import SchedulerConfig
from harness.resolve.compose import compose_run
from harness.resolve.scheduler import noise_scheduler_settings
from models.checkpoint_source import CheckpointSource
from models.registry import REFERENCE
from models.text.t5 import load_t5_prompts
from schedulers.build import build

STEPS, GUIDANCE, SEED = 8, 3.0, 11
PROMPTS = ["red apple, 3d", "rocket"]
NEGATIVE = "blurry"
BOUND = 1e-4  # of pixels in [0, 1]; both run in float32


@pytest.fixture(scope="module", params=["shipped", "random"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the shipped checkpoint, and a copy whose denoiser is all random, so that no zero hides a difference."""
    if request.param == "shipped":
        return REFERENCE / "emoji"
    folder = Path(shutil.copytree(REFERENCE / "emoji", tmp_path_factory.mktemp("random") / "emoji"))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in sorted(load_file(weights).items()):
        scale = 1 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.1
        tensors[name] = (scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    save_file(tensors, weights)
    return folder


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> PixArtSigmaPipeline:
    """Load diffusers' pipeline of the same folder, in float32."""
    pipeline = PixArtSigmaPipeline.from_pretrained(checkpoint, dtype=torch.float32, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return pipeline


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> DiffusionGenerator:
    overrides = [f"model.path={checkpoint}", "launch.mode=inprocess", "launch.threads_per_rank=1", "logger=json"]
    composed = compose_run([*overrides, "attention=math"])
    from harness.engines.inprocess import InprocessEngine

    generator = DiffusionGenerator(composed, InprocessEngine(composed.config))
    generator.start()
    yield generator  # type: ignore[misc]
    generator.stop()


def noise(seed: int, side: int = 16, rows: int | None = None) -> Tensor:
    return torch.randn((1, 4, rows or side, side), generator=torch.Generator("cpu").manual_seed(seed))


@torch.no_grad()
def generate(peer: PixArtSigmaPipeline, prompt: str, latent: Tensor, guidance: float, steps: int = STEPS) -> Tensor:
    """Join diffusers' encode_prompt, transformer, scheduler and vae as its own pipelines join them."""
    states, mask, negative, negative_mask = peer.encode_prompt(
        prompt, guidance > 1, NEGATIVE, clean_caption=False, max_sequence_length=24
    )
    sigmas = np.linspace(1.0, 1 / steps, steps)
    peer.scheduler.set_timesteps(sigmas=sigmas)
    for t in peer.scheduler.timesteps:
        timestep = t.expand(1)
        output = predict(peer, latent, timestep, states, mask)
        if guidance > 1:
            base = predict(peer, latent, timestep, negative, negative_mask)
            output = base + guidance * (output - base)
        latent = peer.scheduler.step(output, t, latent, return_dict=False)[0]
    pixels = peer.vae.decode(latent / peer.vae.config.scaling_factor, return_dict=False)[0]
    return peer.image_processor.postprocess(pixels, output_type="pt")[0]


def predict(peer: PixArtSigmaPipeline, latent: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    return peer.transformer(
        latent,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        timestep=t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]


def apart(ours: np.ndarray, theirs: Tensor) -> float:
    assert ours.shape == tuple(theirs.shape)
    return float(np.abs(ours - theirs.numpy()).max())


def test_images_are_diffusers_own(engine: DiffusionGenerator, peer: PixArtSigmaPipeline) -> None:
    generated = engine.generate(prompts=PROMPTS, negative_prompt=NEGATIVE, seed=SEED, steps=STEPS, guidance=GUIDANCE)
    for k, prompt in enumerate(PROMPTS):
        theirs = generate(peer, prompt, noise(SEED + k), GUIDANCE)
        assert theirs.std() > 0.01, "a flat picture proves nothing"
        assert apart(generated.pixels[k], theirs) < BOUND


def test_the_comparison_sees_prompt_guidance_and_seed(engine: DiffusionGenerator, checkpoint: Path) -> None:
    """The result depends on every field of the request by far more than the bound."""
    if checkpoint == REFERENCE / "emoji":
        pytest.skip("the shipped weights may be anything; the random ones depend on all of it")

    def pixels(**changes: object) -> np.ndarray:
        requested = {
            "prompt": PROMPTS[0],
            "negative_prompt": NEGATIVE,
            "seed": SEED,
            "steps": STEPS,
            "guidance": GUIDANCE,
        }
        return engine.generate(**(requested | changes)).pixels[0]  # type: ignore[arg-type]

    plain = pixels()
    changes = [{"prompt": "rocket"}, {"guidance": 2.0}, {"seed": 12}, {"steps": 7}, {"negative_prompt": "red"}]
    for change in changes:
        assert np.abs(pixels(**change) - plain).max() > 20 * BOUND, change


def test_an_image_without_guidance_and_of_another_shape(engine: DiffusionGenerator, peer: PixArtSigmaPipeline) -> None:
    generated = engine.generate(prompt=PROMPTS[0], seed=SEED, steps=3, guidance=1.0, height=96, width=64)
    theirs = generate(peer, PROMPTS[0], noise(SEED, 16, 24), 1.0, steps=3)
    assert apart(generated.pixels[0], theirs) < BOUND


def test_a_long_prompt_is_truncated_where_diffusers_truncates_it(
    engine: DiffusionGenerator, peer: PixArtSigmaPipeline
) -> None:
    prompt = "a red apple beside a green pear and a yellow lemon under a blue sky with a white cloud and one small bird"
    generated = engine.generate(prompt=prompt, negative_prompt=NEGATIVE, seed=SEED, steps=2, guidance=GUIDANCE)
    assert any("was truncated to 24" in note for note in generated.record.notes)
    assert apart(generated.pixels[0], generate(peer, prompt, noise(SEED), GUIDANCE, steps=2)) < BOUND


def test_text_states_are_diffusers_own(engine: DiffusionGenerator, peer: PixArtSigmaPipeline, checkpoint: Path) -> None:
    encoder = load_t5_prompts(CheckpointSource(checkpoint, text_tokens=24))
    with torch.no_grad():
        ours = encoder(PROMPTS)
        for k, prompt in enumerate(PROMPTS):
            states, mask, _, _ = peer.encode_prompt(prompt, False, clean_caption=False, max_sequence_length=24)
            assert torch.equal(ours.mask[k], mask[0].bool())
            torch.testing.assert_close(ours.prompt_embeds[k], states[0], rtol=1e-5, atol=1e-5)


def test_the_sigmas_are_the_grid_of_the_default_scheduler(peer: PixArtSigmaPipeline) -> None:
    scheduler = build(noise_scheduler_settings(SchedulerConfig()))
    peer.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS))
    torch.testing.assert_close(peer.scheduler.sigmas.double(), scheduler.sigmas(STEPS), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(peer.scheduler.timesteps.double(), scheduler.timesteps(STEPS), rtol=1e-6, atol=1e-4)
