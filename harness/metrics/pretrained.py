"""Scores on pretrained weights that the user gives: CLIP score, and a Frechet distance in a vision model's features.

    CLIP score = mean over pictures of  100 max(cos(image, prompt), 0)           (Hessel et al. 2021, arXiv:2104.08718)
    Frechet    = |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))  of pooled features    (Heusel et al. 2017, arXiv:1706.08500)

Neither compares with published numbers unless weights, pictures and their number are the published ones, so the record
names all three. The distance is not called FID: that is one of Inception's features, whose weights are published as a
pickle, which this project does not open; torch-fidelity computes it from a run's folder (`fidelity --fid --input1
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
from harness.metrics.intervals import IntervalEstimate, interval, resample

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 16
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class Frechet(msgspec.Struct, frozen=True):
    """The distance of `n` pictures to `references` real ones in `features` dimensions.

    value: biased upwards at small n, so it compares only with others of the same n.
    real: the same between two disjoint sets of real pictures, n each or half of them: the floor at this n.
    """

    value: float
    n: int
    references: int
    features: int
    real: float
    real_n: int


class PretrainedScores(msgspec.Struct, frozen=True):
    """`pretrained` of the record; each score with the folder's name whose weights it used.

    clip_score: mean over pictures with a bootstrap interval over prompts.
    """

    clip: str | None
    clip_score: IntervalEstimate | None
    extractor: str | None
    frechet: Frechet | None


def check(config: QualityConfig) -> None:
    """Refuses what cannot be scored, without importing torch.

    Raises:
        ValueError: a folder that is not there or is no such model, or a package to install.
    """
    if config.clip is not None and "text_config" not in _model(config.clip, "quality.clip"):
        raise ValueError(f"quality.clip={config.clip} is no CLIP model: its config.json has no text_config")
    if (config.features is None) != (config.reference is None):
        raise ValueError("quality.features=MODEL and quality.reference=PICTURES go together; give both or neither")
    if config.features is None or config.reference is None:
        return
    if "text_config" in _model(config.features, "quality.features"):
        raise ValueError(
            f"quality.features={config.features} has a text model too; give a vision model alone (DINOv2, ViT)"
        )
    if importlib.util.find_spec("torchmetrics") is None:
        raise ValueError("quality.features needs the package torchmetrics: pip install 'triptych[quality]'")
    if len(_pictures(config.reference)) < 4:
        raise ValueError(f"quality.reference={config.reference} has no four pictures ({', '.join(PICTURES)})")


def score(
    config: QualityConfig, pictures: Sequence[NDArray[np.uint8]], prompts: Sequence[str]
) -> PretrainedScores | None:
    """Scores 8-bit pictures (H, W, 3) drawn for these prompts; None where no weights are given.

    Raises:
        ValueError: weights or pictures that cannot be used.
    """
    if config.clip is None and config.features is None:
        return None
    found = PretrainedScores(None, None, None, None)
    if config.clip is not None:
        value = clip_score(Path(config.clip), pictures, prompts)
        found = msgspec.structs.replace(found, clip=Path(config.clip).resolve().name, clip_score=value)
    if config.features is not None and config.reference is not None:
        distance = frechet(Path(config.features), pictures, _pictures(config.reference))
        found = msgspec.structs.replace(found, extractor=Path(config.features).resolve().name, frechet=distance)
    return found


def clip_score(folder: Path, pictures: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> IntervalEstimate:
    """The CLIP score of 8-bit pictures (H, W, 3) and their prompts, 0 to 100."""
    import torch
    from transformers import CLIPModel, CLIPProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    longest, values = model.config.text_config.max_position_embeddings, []
    with torch.inference_mode():
        for start in range(0, len(pictures), BATCH):
            batch, words = list(pictures[start : start + BATCH]), list(prompts[start : start + BATCH])
            options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
            seen = model(**processor(images=batch, text=words, **options))
            cosine = torch.nn.functional.cosine_similarity(seen.image_embeds, seen.text_embeds)
            values += (100.0 * cosine.clamp(min=0)).tolist()
    group = np.unique(list(prompts), return_inverse=True)[1]
    drawn = resample(int(group.max()) + 1)[:, group]
    return IntervalEstimate(
        float(np.mean(values)), interval((drawn * values).sum(axis=1) / drawn.sum(axis=1)), len(values)
    )


def frechet(folder: Path, pictures: Sequence[NDArray[np.uint8]], references: Sequence[Path]) -> Frechet:
    """The Frechet distance of 8-bit pictures (H, W, 3) to pictures on disk, in a vision model's pooled features.

    Raises:
        ValueError: fewer than two pictures, or a model without pooled features.
    """
    from PIL import Image

    if len(pictures) < 2:
        raise ValueError(f"a Frechet distance needs two pictures or more, not {len(pictures)}")
    known = [np.asarray(Image.open(path).convert("RGB")) for path in references]
    drawn, real = _features(folder, pictures), _features(folder, known)
    order = np.random.default_rng(0).permutation(len(real))
    half = min(len(drawn), len(real) // 2)
    floor = _distance(real[order[:half]], real[order[half : 2 * half]])
    return Frechet(_distance(real, drawn), len(drawn), len(real), real.shape[1], floor, half)


def _distance(real: Tensor, drawn: Tensor) -> float:
    """torchmetrics' Frechet distance of features (N, d) and (M, d)."""
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(torch.nn.Module):
        """Features that have been computed already."""

        num_features = real.shape[1]

        def forward(self, features: Tensor) -> Tensor:
            return features

    metric = FrechetInceptionDistance(feature=Given())
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    return float(metric.compute())


def _features(folder: Path, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Pooled features (N, d) of a transformers vision model."""
    import torch
    from transformers import AutoImageProcessor, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    found = []
    with torch.inference_mode():
        for start in range(0, len(pictures), BATCH):
            pooled = model(**processor(images=list(pictures[start : start + BATCH]), return_tensors="pt")).pooler_output
            if pooled is None:
                raise ValueError(f"{folder} has no pooled features; give a model with a pooler (DINOv2, ViT)")
            found.append(pooled.flatten(1))
    return torch.cat(found)


def _model(folder: str, key: str) -> dict[str, object]:
    """The config.json of a transformers model's folder."""
    path = Path(folder)
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise ValueError(f"{key}={folder} is no transformers model: it needs config.json and *.safetensors")
    if not (path / "preprocessor_config.json").is_file() and not (path / "processor_config.json").is_file():
        raise ValueError(f"{key}={folder} has no preprocessor_config.json, which says how pictures are prepared")
    try:
        config = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{key}={folder}: config.json cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{key}={folder}: config.json is no object")
    return config


def _pictures(folder: str) -> list[Path]:
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in PICTURES)
