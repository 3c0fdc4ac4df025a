"""Scores on pretrained weights that the user gives: CLIP score, and a Frechet distance in a vision model's features.

    CLIP score = mean over images of  100 max(cos(image, prompt), 0)             (Hessel et al. 2021, arXiv:2104.08718)
    Frechet    = |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))  of pooled features    (Heusel et al. 2017, arXiv:1706.08500)

Neither compares with published numbers unless weights, images and their number are the published ones, so the record
names all three. The distance is not called FID: that is one of Inception's features, whose weights are published as a
pickle, which this project does not open. torch-fidelity computes it from a run's folder (`fidelity --fid --input1
RUN/samples --input2 DIR`). Weights are safetensors of transformers models; torch is imported only when they are used.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from harness.config.schema import QualityConfig
from harness.metrics.intervals import IntervalEstimate, interval, resample_blocks

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 16
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Frechet(msgspec.Struct, frozen=True):
    """The Frechet distance of generated images to real ones.

    Attributes:
        value: The distance. It is biased upwards at small n, so it compares only with others of the same n.
        n: Number of generated images.
        references: Number of real images.
        features: Number of feature dimensions.
        real: The distance between two disjoint sets of real images: the floor at this n.
        real_n: Number of images in each of these sets: n, or half of the real images.
    """

    value: float
    n: int
    references: int
    features: int
    real: float
    real_n: int


class PretrainedScores(msgspec.Struct, frozen=True):
    """`pretrained` of the record: scores with the folder name of the weights used.

    Attributes:
        clip: Folder name of the CLIP model.
        clip_score: Mean over images, with a bootstrap interval over prompts.
        extractor: Folder name of the vision model.
        frechet: The Frechet distance.
    """

    clip: str | None
    clip_score: IntervalEstimate | None
    extractor: str | None
    frechet: Frechet | None


def check(config: QualityConfig) -> None:
    """Refuse what cannot be scored, without importing torch.

    Raises:
        ValueError: A folder does not exist or holds no such model, or a package has to be installed.
    """
    if config.clip is not None and "text_config" not in _model(config.clip, "quality.clip"):
        raise ValueError(f"quality.clip={config.clip} is no CLIP model: its config.json has no text_config")
    if (config.features is None) != (config.reference is None):
        raise ValueError("quality.features=MODEL and quality.reference=IMAGES go together; give both or neither")
    if config.features is None or config.reference is None:
        return
    if "text_config" in _model(config.features, "quality.features"):
        raise ValueError(
            f"quality.features={config.features} has a text model too; give a vision model alone (DINOv2, ViT)"
        )
    if importlib.util.find_spec("torchmetrics") is None:
        raise ValueError("quality.features needs the package torchmetrics: pip install 'triptych[quality]'")
    if len(_image_files(config.reference)) < 4:
        raise ValueError(f"quality.reference={config.reference} has no four images ({', '.join(IMAGE_SUFFIXES)})")


def score(
    config: QualityConfig,
    images: Sequence[NDArray[np.uint8]],
    prompts: Sequence[str],
    clip: Sequence[float] | None = None,
) -> PretrainedScores | None:
    """Score 8-bit images generated for these prompts.

    Args:
        config: The `quality` group.
        images: Images (H, W, 3).
        prompts: The prompt of each image.
        clip: The CLIP score of each image, if it is known.

    Returns:
        The scores, or None if no weights are given.

    Raises:
        ValueError: Weights or images cannot be used.
    """
    if config.clip is None and config.features is None:
        return None
    found = PretrainedScores(None, None, None, None)
    if config.clip is not None:
        value = clip_score(Path(config.clip), images, prompts) if clip is None else clip_estimate(clip, prompts)
        found = msgspec.structs.replace(found, clip=Path(config.clip).resolve().name, clip_score=value)
    if config.features is not None and config.reference is not None:
        distance = frechet(Path(config.features), images, _image_files(config.reference))
        found = msgspec.structs.replace(found, extractor=Path(config.features).resolve().name, frechet=distance)
    return found


def clip_score(folder: Path, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> IntervalEstimate:
    """Return the CLIP score of 8-bit images (H, W, 3) and their prompts, 0 to 100."""
    return clip_estimate(clip_scores(folder, images, prompts), prompts)


def clip_scores(folder: Path, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> list[float]:
    """Return the CLIP score of each 8-bit image (H, W, 3) and its prompt, 0 to 100."""
    import torch
    from transformers import CLIPModel, CLIPProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    longest = model.config.text_config.max_position_embeddings
    values: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            batch, words = list(images[start : start + BATCH]), list(prompts[start : start + BATCH])
            options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
            seen = model(**processor(images=batch, text=words, **options))
            cosine = torch.nn.functional.cosine_similarity(seen.image_embeds, seen.text_embeds)
            values += (100.0 * cosine.clamp(min=0)).tolist()
    return values


def clip_estimate(values: Sequence[float], prompts: Sequence[str]) -> IntervalEstimate:
    """Return the mean of images' scores, with a bootstrap interval over prompts.

    Args:
        values: The score of each image.
        prompts: The prompt of each image.

    Returns:
        The mean and its interval.
    """
    group, x = np.unique(list(prompts), return_inverse=True)[1], np.asarray(values)
    groups = int(group.max()) + 1
    means = np.concatenate(
        [(counts[:, group] @ x) / counts[:, group].sum(axis=1) for counts in resample_blocks(groups)]
    )
    return IntervalEstimate(float(np.mean(values)), interval(means, groups), len(values))


def frechet(folder: Path, images: Sequence[NDArray[np.uint8]], references: Sequence[Path]) -> Frechet:
    """Return the Frechet distance of 8-bit images to images on disk, in a vision model's pooled features.

    Args:
        folder: The vision model's folder.
        images: Generated images (H, W, 3).
        references: Files of the real images.

    Returns:
        The distance, with the floor between real images.

    Raises:
        ValueError: There are fewer than two images, or the model has no pooled features.
    """
    from PIL import Image

    if len(images) < 2:
        raise ValueError(f"a Frechet distance needs two images or more, not {len(images)}")
    known = [np.asarray(Image.open(path).convert("RGB")) for path in references]
    generated, real = _features(folder, images), _features(folder, known)
    order = np.random.default_rng(0).permutation(len(real))
    half = min(len(generated), len(real) // 2)
    floor = _distance(real[order[:half]], real[order[half : 2 * half]])
    return Frechet(_distance(real, generated), len(generated), len(real), real.shape[1], floor, half)


def _distance(real: Tensor, generated: Tensor) -> float:
    """Return torchmetrics' Frechet distance of features (N, d) and (M, d)."""
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    class _Precomputed(torch.nn.Module):
        """Features that have been computed already."""

        num_features = real.shape[1]

        def forward(self, features: Tensor) -> Tensor:
            return features

    metric = FrechetInceptionDistance(feature=_Precomputed())
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


def _features(folder: Path, images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Return the pooled features (N, d) of a transformers vision model."""
    import torch
    from transformers import AutoImageProcessor, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            pooled = model(**processor(images=list(images[start : start + BATCH]), return_tensors="pt")).pooler_output
            if pooled is None:
                raise ValueError(f"{folder} has no pooled features; give a model with a pooler (DINOv2, ViT)")
            found.append(pooled.flatten(1))
    return torch.cat(found)


def _model(folder: str, key: str) -> dict[str, object]:
    """Return the config.json of a transformers model's folder."""
    path = Path(folder)
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise ValueError(f"{key}={folder} is no transformers model: it needs config.json and *.safetensors")
    if not (path / "preprocessor_config.json").is_file() and not (path / "processor_config.json").is_file():
        raise ValueError(f"{key}={folder} has no preprocessor_config.json, which says how images are preprocessed")
    try:
        config = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{key}={folder}: config.json cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{key}={folder}: config.json is no object")
    return config


def _image_files(folder: str) -> list[Path]:
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
