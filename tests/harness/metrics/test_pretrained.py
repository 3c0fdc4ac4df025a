"""Scores on weights of the user: tiny random ones here, against the formulas; missing packages are reported early."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizerFast,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from harness.client.build_record import score_pretrained
from harness.config.schema import QualityConfig
from harness.loggers.scalars import pretrained_scalars
from harness.loggers.table import print_pretrained
from harness.metrics import pretrained
from harness.metrics.pretrained import Frechet, PretrainedScores
from harness.records.record import fingerprint
from harness.resolve.compose import ConfigError, compose_run, to_dict

ROOT = Path(__file__).parents[3]
PROMPTS = ["red apple", "rocket, 3d", "Zebra!", "#~", "qq", "012"] * 3  # more than one batch


@pytest.fixture(scope="module")
def sample_images() -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    noise, colour = rng.integers(0, 40, (18, 64, 64, 3)), rng.integers(0, 2, (18, 1, 1, 3)) * 215
    return list((noise + colour).astype(np.uint8))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a CLIP of a few thousand random weights, whose tokens are single characters."""
    folder = tmp_path_factory.mktemp("clip")
    marks = [chr(code) for code in range(33, 127)]
    tokens = [*marks, *(f"{mark}</w>" for mark in marks), "<|startoftext|>", "<|endoftext|>"]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    text = {"vocab_size": len(tokens), "max_position_embeddings": 12, **sizes, **ends}
    torch.manual_seed(0)
    image = {"image_size": 32, "patch_size": 8, **sizes}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tokenizer = CLIPTokenizerFast(vocab={token: k for k, token in enumerate(tokens)}, merges=[])
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a vision transformer of four pooled features."""
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write(folder: Path, sample_images: list[NDArray[np.uint8]]) -> Path:
    folder.mkdir(parents=True)
    for k, source_image in enumerate(sample_images):
        Image.fromarray(source_image).save(folder / f"{k:02d}.png")
    return folder


def test_the_clip_score_is_the_papers(clip: Path, sample_images: list[NDArray[np.uint8]]) -> None:
    found = pretrained.clip_score(clip, sample_images, PROMPTS)
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    cosines = []
    for source_image, prompt in zip(sample_images, PROMPTS, strict=True):
        inputs = processor(images=source_image, text=prompt, truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            image = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
            text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output[0]
        cosines.append(float(image @ text / image.norm() / text.norm()))
    assert min(cosines) < 0 < max(cosines)
    assert found.value == pytest.approx(100 * np.mean(np.maximum(cosines, 0)), rel=1e-4)
    assert found.bounds[0] <= found.value <= found.bounds[1]
    assert found.n == 18


def test_a_prompt_longer_than_the_text_model_is_truncated(clip: Path, sample_images: list[NDArray[np.uint8]]) -> None:
    assert pretrained.clip_score(clip, sample_images[:1], ["a" * 500]).n == 1


def test_the_frechet_distance_is_the_papers(
    vision: Path, sample_images: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    pytest.importorskip("torchmetrics", reason="the distance needs triptych[quality]")
    darker = [(source_image // 2).astype(np.uint8) for source_image in sample_images]
    folder = write(tmp_path / "real", sample_images)
    found = pretrained.frechet(vision, darker, sorted(folder.iterdir()))
    real, generated = (pretrained._features(vision, each).double().numpy() for each in (sample_images, darker))
    gap = ((real.mean(axis=0) - generated.mean(axis=0)) ** 2).sum()
    a, b = np.cov(real.T), np.cov(generated.T)
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    assert found.value == pytest.approx(gap + np.trace(a) + np.trace(b) - 2 * root, rel=1e-4)
    assert (found.n, found.references, found.features, found.real_n) == (18, 18, 4, 9)
    assert 0 < found.real < found.value
    assert pretrained.frechet(vision, sample_images, sorted(folder.iterdir())).value == pytest.approx(0, abs=1e-6)


def config(**keys: Path) -> QualityConfig:
    return QualityConfig(**{key: str(value) for key, value in keys.items()})


def test_both_scores_of_a_run_or_none(
    clip: Path, vision: Path, sample_images: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    pytest.importorskip("torchmetrics", reason="the distance needs triptych[quality]")
    requested = config(clip=clip, features=vision, reference=write(tmp_path / "real", sample_images))
    pretrained.check(requested)
    found = pretrained.score(requested, sample_images, PROMPTS)
    assert found is not None
    assert (found.clip, found.extractor) == (clip.name, vision.name)
    assert found.clip_score is not None
    assert found.frechet is not None
    assert pretrained.score(QualityConfig(), sample_images, PROMPTS) is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"clip": "missing"}, "is no transformers model: it needs config.json"),
        ({"clip": "vision"}, "is no CLIP model"),
        ({"features": "vision"}, "go together"),
        ({"reference": "real"}, "go together"),
        ({"features": "clip", "reference": "real"}, "give a vision model alone"),
        ({"features": "vision", "reference": "missing"}, "has no four images"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_a_run(
    keys: dict[str, str], message: str, clip: Path, vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    places = {"clip": clip, "vision": vision, "missing": tmp_path / "missing", "real": tmp_path}
    with pytest.raises(ConfigError, match=message) as caught:
        compose_run([f"quality.{key}={places[value]}" for key, value in keys.items()])
    assert "\n" not in str(caught.value)


def test_without_torchmetrics_the_line_names_the_extra(
    vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'triptych\[quality\]'"):
        compose_run([f"quality.features={vision}", f"quality.reference={tmp_path}"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "[]", "config.json is no object"),
        ("config.json", None, "it needs config.json"),
        ("model.safetensors", None, r"it needs config\.json and \*\.safetensors"),
        ("preprocessor_config.json", None, "has no preprocessor_config.json"),
    ],
)
def test_a_broken_model_folder_is_refused(
    vision: Path, tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    for file in vision.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        pretrained.check(config(clip=tmp_path))


def test_scores_change_no_fingerprint_and_checking_needs_no_torch(clip: Path) -> None:
    requested = to_dict(compose_run([f"quality.clip={clip}"]).config)
    assert fingerprint(requested) == fingerprint(to_dict(compose_run([]).config))
    composed = f"from harness.resolve.compose import compose_run; compose_run(['quality.clip={clip}'])"
    code = f"import sys; {composed}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, check=True
    )
    assert done.stdout.split() == ["False"]


def test_weights_that_fail_after_the_run_are_a_note(clip: Path, tmp_path: Path) -> None:
    for file in clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["projection_dim"] = 9
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for _ in range(2):  # weights of other sizes, then none that can be read
        found, notes = score_pretrained(config(clip=tmp_path), [np.zeros((3, 64, 64), np.float32)], ["rocket"])
        assert found is None
        assert len(notes) == 1
        assert notes[0].startswith("quality.clip and quality.features are not scored: ")
        assert "\n" not in notes[0]
        (tmp_path / "model.safetensors").write_bytes(b"")


def test_the_scores_are_printed_and_mirrored() -> None:
    scores = PretrainedScores(
        "clip-vit", pretrained.IntervalEstimate(25.5, (24.0, 27.0), 96), "dino", Frechet(3.5, 96, 512, 384, 1.2, 96)
    )
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_pretrained(scores, console)
    shown = console.export_text()
    assert "CLIP score (clip-vit) 25.500 (24.000 .. 27.000)" in shown
    assert "(dino, 384 features) 3.5 for 96 images against 512; real against real, 96 each: 1.2" in shown
    scalars = pretrained_scalars(scores)
    assert (scalars["clip_score"], scalars["clip_score_ci95_high"], scalars["frechet"]) == (25.5, 27.0, 3.5)
    assert pretrained_scalars(None) == {}
