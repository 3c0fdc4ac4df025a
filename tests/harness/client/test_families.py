"""Three families of one checkpoint: each uses its own denoiser, and the record says which times the network got."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from harness.client.generator import DiffusionGenerator, Generation
from models.registry import REFERENCE

FOLDERS = {"rectified_flow": "transformer", "ddpm": "transformer_ddpm", "sgm": "transformer_sgm"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Save the shipped weights under all three names: two families generate noise, but finite numbers."""
    folder = tmp_path / "emoji"
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(REFERENCE / "emoji" / part, folder / part)
    for name in FOLDERS.values():
        shutil.copytree(REFERENCE / "emoji" / "transformer", folder / name)
    return folder


def generate(checkpoint: Path, family: str) -> Generation:
    overrides = [f"model.path={checkpoint}", f"scheduler={family}", "request.prompt=rocket", "request.steps=2"]
    quiet = ["launch.mode=inprocess", "launch.threads_per_rank=1", "logger=json"]
    with DiffusionGenerator.from_config(*overrides, *quiet) as generator:
        generation = generator.generate()
        record = generation.record
    assert record.config["scheduler"]["family"] == family
    assert np.isfinite(generation.pixels[0]).all()
    return generation


def spoil(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["proj_out.bias"] += 0.5
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("family", FOLDERS)
def test_a_family_generates_with_its_own_denoiser_alone(checkpoint: Path, family: str) -> None:
    before = generate(checkpoint, family).pixels[0]
    assert before.std() > 0.01, "a flat picture proves nothing"
    for other, folder in FOLDERS.items():
        if other != family:
            shutil.rmtree(checkpoint / folder)
    assert np.array_equal(generate(checkpoint, family).pixels[0], before)
    spoil(checkpoint / FOLDERS[family])
    assert np.abs(generate(checkpoint, family).pixels[0] - before).max() > 0.01
