"""Scores of a data set's images, read from disk one after another and written into their lines of images.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from harness.config.schema import QualityConfig
from harness.metrics import own, pretrained
from harness.metrics.gallery import FILE as GALLERY
from harness.metrics.gallery import Gallery, GalleryError
from harness.metrics.pretrained import PretrainedScores
from harness.metrics.quality import GalleryScore, Quality, parse_prompt, score, score_image
from harness.records.images import ImageRow, read_images, rewrite_images

MOST_SCORED = 1_000  # images of the gallery's scores over all images, whose distances are compared in pairs


class StoredImages(Sequence[NDArray[np.uint8]]):
    """Images on disk as a sequence, of which none stays in memory.

    Args:
        files: Files of the images.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, place: int) -> NDArray[np.uint8]: ...

    @overload
    def __getitem__(self, place: slice) -> list[NDArray[np.uint8]]: ...

    def __getitem__(self, place: int | slice) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        from PIL import Image

        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self.files)))]
        with Image.open(self.files[place]) as image:
            return np.asarray(image.convert("RGB"))


@dataclass
class ImageScores:
    """The scores over all images of a folder.

    Attributes:
        quality: The scores in the gallery; None if it has no such images.
        pretrained: The scores on pretrained weights; None if none was requested.
        metrics: The metrics of plug-ins.
        reasons: Why requested ones are missing.
    """

    quality: Quality | None = None
    pretrained: PretrainedScores | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


def score_images(folder: Path, checkpoint: Path, config: QualityConfig, plugin: Mapping[str, object]) -> ImageScores:
    """Score the images of a run's folder, and write each image's own scores into its line.

    Args:
        folder: The run's folder.
        checkpoint: The checkpoint's folder, which may have a gallery.
        config: The `quality` group.
        plugin: The options of plug-ins.

    Returns:
        The scores over all images.
    """
    files, prompts = _files_and_prompts(folder)
    if any(file.suffix == ".mp4" for file in files):
        return ImageScores(reasons=["quality is not scored: it is measured on images, and these are videos"])
    images = StoredImages(files)
    reasons: list[str]
    quality, of_gallery, extra, clip = None, None, None, None
    try:
        quality, of_gallery, reasons = _score_gallery(images, prompts, checkpoint / GALLERY)
    except GalleryError as error:
        reasons = [f"quality is not scored: {error}"]
    try:
        clip = None if config.clip is None else pretrained.clip_scores(Path(config.clip), images, prompts)
        extra = pretrained.score(config, images, prompts, clip)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        reasons.append(f"quality.clip and quality.features are not scored: {' '.join(str(error).split())}")
    if of_gallery is not None or clip is not None:
        rewrite_images(folder, _with_scores(folder, of_gallery, clip))
    metrics, missing = own.measure(config.metrics, images, prompts, plugin)
    return ImageScores(quality, extra, metrics, [*reasons, *missing])


def _files_and_prompts(folder: Path) -> tuple[list[Path], list[str]]:
    files, prompts = [], []
    for row in read_images(folder):
        files.append(folder / row.path)
        prompts.append(row.prompt)
    return files, prompts


def _score_gallery(
    images: StoredImages, prompts: Sequence[str], file: Path
) -> tuple[Quality | None, Sequence[GalleryScore | None] | None, list[str]]:
    """Return the scores over an even part of the images, the scores of each image, and notes."""
    if not file.is_file():
        return None, None, [f"quality is not scored: the checkpoint has no {file.name}"]
    gallery = Gallery.load(file)
    known = [number for number, prompt in enumerate(prompts) if parse_prompt(prompt, gallery) is not None]
    if not known:
        return None, None, [f"quality is not scored: no prompt is a name, or a name and a style, of {file.name}"]
    scored: list[GalleryScore | None] = [None] * len(prompts)
    for number in known:
        scored[number] = score_image(gallery, images[number], prompts[number])
    part = known[:: -(-len(known) // MOST_SCORED)]
    chosen = StoredImages([images.files[number] for number in part])
    quality = score(gallery, chosen, [prompts[number] for number in part])
    notes = [f"quality is that of {len(part)} of {len(known)} images, evenly chosen"] if len(part) < len(known) else []
    return quality, scored, notes


def _with_scores(
    folder: Path, of_gallery: Sequence[GalleryScore | None] | None, clip: Sequence[float] | None
) -> Iterator[ImageRow]:
    for number, row in enumerate(read_images(folder)):
        found = None if of_gallery is None else of_gallery[number]
        yield msgspec.structs.replace(
            row,
            top1=None if found is None else found.top1,
            distance=None if found is None else found.distance,
            clip_score=None if clip is None else clip[number],
        )
