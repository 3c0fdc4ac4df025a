"""Components that do not belong together are refused before ranks start, and by the ranks, in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.resolve.compose import ConfigError, compose_run
from models.registry import PUBLISHED

MODELS = sorted(folder.name for folder in PUBLISHED.iterdir() if (folder / "model_index.json").is_file())


def rewrite(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def copy_of(model: str, folder: Path) -> Path:
    """Return a copy of the published configurations of a model."""
    return Path(shutil.copytree(PUBLISHED / model, folder / model))


def without_a_template(folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")


def compose(model: str, folder: Path) -> None:
    compose_run([f"model={model}", f"model.path={folder}", "model.load=dummy"])


@pytest.mark.parametrize("model", MODELS)
def test_published_components_belong_together(model: str, tmp_path: Path) -> None:
    compose(model, copy_of(model, tmp_path))


@pytest.mark.parametrize(
    ("model", "change", "line"),
    [
        (
            "wan_1_3b",
            lambda folder: rewrite(folder / "model_index.json", boundary_ratio=0.875),
            "only Wan 2.1's text-to-video checkpoints load here",
        ),
        (
            "wan_1_3b",
            lambda folder: rewrite(folder / "model_index.json", expand_timesteps=True),
            "only Wan 2.1's text-to-video checkpoints load here",
        ),
        (
            "sd3",
            lambda folder: shutil.rmtree(folder / "text_encoder_3"),
            "model_index.json names text_encoder_3, which is not here",
        ),
        (
            "sdxl",
            lambda folder: rewrite(folder / "unet" / "config.json", projection_class_embeddings_input_dim=2560),
            "the network takes 2560 conditioning channels",
        ),
        (
            "flux",
            lambda folder: rewrite(folder / "text_encoder" / "config.json", model_type="t5"),
            "config.json says model_type=t5; text_encoder is a clip_text_model here",
        ),
        (
            "z_image",
            lambda folder: rewrite(folder / "text_encoder" / "config.json", model_type="qwen2_5_vl"),
            "config.json says model_type=qwen2_5_vl; text_encoder is a qwen3 here",
        ),
        (
            "sd15",
            lambda folder: rewrite(folder / "vae" / "config.json", latent_channels=16),
            "the network has 4 latent channels, the VAE decodes 16; take both from one checkpoint",
        ),
        (
            "flux",
            lambda folder: rewrite(folder / "transformer" / "config.json", in_channels=16),
            "the network has 4 latent channels, the VAE decodes 16; take both from one checkpoint",
        ),
        ("z_image", without_a_template, "no chat template here; copy all of the checkpoint's tokenizer files"),
    ],
)
def test_strangers_are_refused(model: str, change: Callable[[Path], object], line: str, tmp_path: Path) -> None:
    folder = copy_of(model, tmp_path)
    change(folder)
    with pytest.raises(ConfigError) as caught:
        compose(model, folder)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
