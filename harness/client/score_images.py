"""Scores of a data set's images, read from disk one after another and written into their lines of images.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from harness.config.schema import QualityConfig
from harness.metrics import pretrained
from harness.metrics.gallery import FILE as GALLERY
from harness.metrics.gallery import Gallery, GalleryError
from harness.metrics.quality import Quality, parse_prompt, score, score_image
from harness.records.images import ImageRow, grid_rows, read_images, rewrite_images

MOST_SCORED = 1_000  # images of the gallery's scores over all images, whose distances are compared in pairs


class StoredImages(Sequence[NDArray[np.uint8]]):
    """Images on disk as a sequence, of which none stays in memory.

    Args:
        files: Their files.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, place: int) -> NDArray[np.uint8]: ...

    @overload
    def __getitem__(self, place: slice) -> list[NDArray[np.uint8]]: ...

    def __getitem__(self, place: int | slice) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        from PIL import Image

        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self._files)))]
        with Image.open(self._files[place]) as image:
            return np.asarray(image.convert("RGB"))


def score_images(
    folder: Path, checkpoint: Path, config: QualityConfig
) -> tuple[Quality | None, pretrained.PretrainedScores | None, list[str]]:
    """Score the images of a run's folder, and write each image's own scores into its line.

    Args:
        folder: The run's folder.
        checkpoint: The checkpoint's folder, which may have a gallery.
        config: The `quality` group.

    Returns:
        The scores over all images, and the reasons why requested ones are missing.
    """
    rows = list(read_images(folder))
    if any(row.path.endswith(".mp4") for row in rows):
        return None, None, ["quality is not scored: it is measured on images, and these are videos"]
    found, quality = rows, None
    reasons: list[str] = []
    if (checkpoint / GALLERY).is_file():
        try:
            gallery = Gallery.load(checkpoint / GALLERY)
            found, quality, reasons = _score_gallery(folder, found, gallery)
        except GalleryError as error:
            reasons = [f"quality is not scored: {error}"]
    else:
        reasons = [f"quality is not scored: the checkpoint has no {GALLERY}"]
    extra = None
    try:
        found, extra = _score_pretrained(folder, found, config)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        reasons.append(f"quality.clip and quality.features are not scored: {' '.join(str(error).split())}")
    if found is not rows:
        rewrite_images(folder, found)
    return quality, extra, reasons


def _score_gallery(
    folder: Path, rows: list[ImageRow], gallery: Gallery
) -> tuple[list[ImageRow], Quality | None, list[str]]:
    """Return the rows with their scores in the gallery, those over an even part of them, and notes."""
    known = [row for row in rows if parse_prompt(row.prompt, gallery) is not None]
    if not known:
        return rows, None, [f"quality is not scored: no prompt is a name, or a name and a style, of {GALLERY}"]
    images = StoredImages([folder / row.path for row in rows])
    scored = list(_with_gallery_scores(rows, images, gallery))
    part = grid_rows(known, len(known), MOST_SCORED)
    quality = score(gallery, StoredImages([folder / row.path for row in part]), [row.prompt for row in part])
    notes = [f"quality is that of {len(part)} of {len(known)} images, evenly chosen"] if len(part) < len(known) else []
    return scored, quality, notes


def _with_gallery_scores(rows: Sequence[ImageRow], images: StoredImages, gallery: Gallery) -> Iterator[ImageRow]:
    for number, row in enumerate(rows):
        found = None if parse_prompt(row.prompt, gallery) is None else score_image(gallery, images[number], row.prompt)
        yield row if found is None else msgspec.structs.replace(row, top1=found.top1, distance=found.distance)


def _score_pretrained(
    folder: Path, rows: list[ImageRow], config: QualityConfig
) -> tuple[list[ImageRow], pretrained.PretrainedScores | None]:
    """Return the rows with their CLIP scores, and the scores over all images."""
    images, prompts = StoredImages([folder / row.path for row in rows]), [row.prompt for row in rows]
    if config.clip is None:
        return rows, pretrained.score(config, images, prompts)
    values = pretrained.clip_scores(Path(config.clip), images, prompts)
    scored = [msgspec.structs.replace(row, clip_score=value) for row, value in zip(rows, values, strict=True)]
    return scored, pretrained.score(config, images, prompts, values)
