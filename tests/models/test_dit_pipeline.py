"""A class-conditional checkpoint saved by diffusers gives diffusers' images, from classes to pixels."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor

from harness.client.generator import DiffusionGenerator
from harness.engines.protocol import RequestFailed
from harness.pipeline.latents import seeded_noise, step_noise
from tests.fixtures.generators import generator
from tests.fixtures.models.dit import LINEAR, SIDE, save

BOUND = 1e-4  # of pixels in [0, 1]; both run in float32
STEPS, GUIDANCE, SEED = 6, 4.0, 11
CLASSES = {"Tinca tinca": 0, "goldfish": 1, "999": 999}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dit")
    save(folder)
    return folder


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> DiTPipeline:
    pipeline = DiTPipeline.from_pretrained(checkpoint, dtype=torch.float32, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def start(checkpoint: Path, *overrides: str) -> DiffusionGenerator:
    common = [f"model.path={checkpoint}", "model=dit_256", "model.dtype=float32", "model.size_multiple=4"]
    sizes = [f"model.{name}={2 * SIDE}" for name in ("height", "width")]
    engine = generator(*common, *sizes, "model.examples=[goldfish]", *overrides)
    engine.start()
    return engine


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[DiffusionGenerator]:
    engine = start(checkpoint)
    yield engine
    engine.stop()


def generate(peer: DiTPipeline, prompt: str, seed: int, guidance: float, steps: int = STEPS) -> np.ndarray:
    """Run diffusers' own pipeline; it takes its noise from the generator, as seeded_noise does."""
    label = int(prompt) if prompt.isdecimal() else peer.get_label_ids([prompt])[0]
    noise = torch.Generator().manual_seed(seed)
    images = peer([label], guidance, noise, num_inference_steps=steps, output_type="np").images
    return images[0].transpose(2, 0, 1)


def test_images_are_diffusers_own(engine: DiffusionGenerator, peer: DiTPipeline) -> None:
    generated = engine.generate(prompts=list(CLASSES), seed=SEED, steps=STEPS, guidance=GUIDANCE)
    for k, prompt in enumerate(CLASSES):
        theirs = generate(peer, prompt, SEED + k, GUIDANCE)
        assert theirs.std() > 0.05, "a flat picture proves nothing"
        assert np.abs(generated.pixels[k] - theirs).max() < BOUND


def test_a_batch_and_no_guidance(engine: DiffusionGenerator, peer: DiTPipeline) -> None:
    generated = engine.generate(prompts=list(CLASSES), seed=SEED, steps=5, guidance=1.0, batch_size=3)
    for k, prompt in enumerate(CLASSES):
        assert np.abs(generated.pixels[k] - generate(peer, prompt, SEED + k, 1.0, steps=5)).max() < BOUND


def test_the_comparison_sees_class_guidance_and_seed(engine: DiffusionGenerator) -> None:
    def pixels(**changes: Any) -> np.ndarray:
        requested = {"prompt": "goldfish", "seed": SEED, "steps": STEPS, "guidance": GUIDANCE}
        return engine.generate(**(requested | changes)).pixels[0]

    plain = pixels()
    changes = [{"prompt": "cock"}, {"guidance": 2.0}, {"seed": 12}, {"steps": 7}, {"negative_prompt": "cock"}]
    for change in changes:
        assert np.abs(pixels(**change) - plain).max() > 20 * BOUND, change
    assert np.array_equal(pixels(prompt="1"), plain)


def test_an_image_need_not_be_square(engine: DiffusionGenerator) -> None:
    generated = engine.generate(prompt="goldfish", seed=SEED, steps=2, height=12, width=24)
    assert generated.pixels[0].shape == (3, 12, 24)


@pytest.mark.parametrize("where", ["prompt", "negative_prompt"])
def test_an_unknown_class_is_refused_with_the_nearest(engine: DiffusionGenerator, where: str) -> None:
    with pytest.raises(RequestFailed, match=r"'goldfisch' is not a class; did you mean goldfish\?") as caught:
        engine.generate(**({"prompt": "cock", "steps": 1} | {where: "goldfisch"}))
    assert caught.value.kind == "rejected"


# ---------------------------------------------------------------- the learned variance


@torch.no_grad()
def ancestral(
    peer: DiTPipeline, label: int, guidance: float, steps: int, monkeypatch: pytest.MonkeyPatch, **options: object
) -> Tensor:
    """Run DDPM's loop by hand: eps guided, the variance of the class, and this harness's noise in each step."""
    scheduler = DDPMScheduler(variance_type="learned_range", **LINEAR, **options)
    scheduler.set_timesteps(steps)
    generated = iter(range(steps))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor",
        lambda shape, **_: step_noise(SEED, next(generated), tuple(shape[1:]))[None],
    )
    x = seeded_noise(SEED, (4, SIDE, SIDE))[None]
    for t in scheduler.timesteps:
        both = peer.transformer(torch.cat([x, x]), t.expand(2), torch.tensor([label, 1000])).sample
        (eps, null), variance = both.split(4, dim=1)[0].unbind(), both[:1, 4:]
        output = torch.cat([(null + guidance * (eps - null))[None], variance], dim=1)
        x = scheduler.step(output, t, x).prev_sample
    pixels = peer.vae.decode(x / peer.vae.config.scaling_factor).sample
    return (pixels / 2 + 0.5).clamp(0, 1)[0]


DDPM = ["scheduler=ddpm", "scheduler/solver=ddpm", "scheduler.solver.variance=learned_range"]
CASES = {
    "leading": ([], {"clip_sample": False}),
    "trailing": (
        ["scheduler.spacing=trailing", "scheduler.solver.final_noise=true"],
        {"clip_sample": False, "timestep_spacing": "trailing"},
    ),
    "clipped": (["scheduler.clip=1.0"], {"clip_sample": True}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_learned_variance_is_the_class_own(
    checkpoint: Path, peer: DiTPipeline, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    overrides, options = CASES[case]
    engine = start(checkpoint, *DDPM, "scheduler.spacing=leading", *overrides)
    try:
        generated = engine.generate(prompt="goldfish", seed=SEED, steps=4, guidance=GUIDANCE)
    finally:
        engine.stop()
    theirs = ancestral(peer, 1, GUIDANCE, 4, monkeypatch, **options)
    assert theirs.std() > 0.05
    assert np.abs(generated.pixels[0] - theirs.numpy()).max() < BOUND


def test_the_learned_variance_is_neither_of_the_fixed_ones(checkpoint: Path) -> None:
    images = []
    for variance in ("learned_range", "small", "large"):
        engine = start(checkpoint, *DDPM[:2], f"scheduler.solver.variance={variance}", "scheduler.spacing=leading")
        images.append(engine.generate(prompt="goldfish", seed=SEED, steps=4, guidance=GUIDANCE).pixels[0])
        engine.stop()
    assert min(np.abs(images[0] - other).max() for other in images[1:]) > 20 * BOUND


def test_a_network_without_a_variance_needs_none(checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = DiTTransformer2DModel(2, 12, 4, num_layers=1, sample_size=SIDE)
    plain.save_pretrained(tmp_path / "transformer")
    (tmp_path / "vae").symlink_to(checkpoint / "vae")
    with pytest.raises(ValueError, match=r"model\.checkpoint_defaults\.ddpm\.learned_variance=false"):
        start(tmp_path, *DDPM[:2])
    engine = start(tmp_path, *DDPM[:2], "model.checkpoint_defaults.ddpm.learned_variance=false", "model.examples=['1']")
    assert engine.generate(prompt="1", seed=SEED, steps=2).pixels[0].shape == (3, 2 * SIDE, 2 * SIDE)
    engine.stop()
