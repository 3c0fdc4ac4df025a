"""Weights of another component are refused by name, where the libraries would fill the gaps with random numbers."""

import shutil
from pathlib import Path

import pytest
import torch

from harness.resolve.compose import compose_run
from models.checkpoint_source import CheckpointSource
from models.decoders import load_kl_decoder
from models.files import CheckpointError
from models.registry import REFERENCE
from models.text.t5 import load_t5_prompts


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REFERENCE / "emoji", tmp_path / "checkpoint"))


def swap(source: Path, target: Path) -> None:
    shutil.copy(next(source.glob("*.safetensors")), next(target.glob("*.safetensors")))


def test_a_text_encoder_of_other_weights(copy: Path) -> None:
    swap(copy / "vae", copy / "text_encoder")
    with pytest.raises(CheckpointError, match=r"text_encoder: the weights do not fit.*missing") as caught:
        load_t5_prompts(CheckpointSource(copy, text_tokens=24))
    assert "\n" not in str(caught.value)


def test_a_vae_of_other_weights(copy: Path) -> None:
    swap(copy / "transformer", copy / "vae")
    with pytest.raises(CheckpointError, match=r"vae: the weights do not fit.*missing") as caught:
        load_kl_decoder(CheckpointSource(copy))
    assert "\n" not in str(caught.value)


def test_random_weights_need_no_weight_files(copy: Path) -> None:
    for file in copy.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="no weights here"):
        compose_run([f"model.path={copy}"])
    compose_run([f"model.path={copy}", "model.load=dummy"])
    prompt_embeds = load_t5_prompts(CheckpointSource(copy, text_tokens=24, dummy=True))(["rocket"]).prompt_embeds
    assert prompt_embeds.shape == (1, 24, 256)
    assert load_kl_decoder(CheckpointSource(copy, dummy=True))(torch.zeros(1, 4, 2, 3)).shape == (1, 3, 8, 12)
