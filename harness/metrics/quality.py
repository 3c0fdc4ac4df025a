"""The quality of images: retrieval by their prompt and two distances to the requested images.

Everything is measured in a gallery of training images (`harness.metrics.gallery`) on 8-bit images, after all timed
work, with numpy. The extractor is principal components of pixels: it serves to compare samplers of one small model. For
a model that memorizes its training images it says how well it does so. None of it is FID or KID.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from harness.metrics import mmd
from harness.metrics.gallery import Gallery
from harness.metrics.intervals import IntervalEstimate, Share, median, wilson

CHUNK = 256  # images that are in memory at once


class Quality(msgspec.Struct, frozen=True):
    """`quality` of the record. Shares have Wilson's 95 % interval, the distances a bootstrap interval over names.

    Attributes:
        gallery: First digits of the gallery file's sha256; scores of different galleries do not compare.
        scored: Images whose prompt is `name` or `name, style` of the gallery.
        unscored: The other images.
        names: Different names among the scored images.
        chance: Top-1 of a random guess.
        top1: Share of images whose nearest training image has the requested name.
        top5: Share of images with the requested name among the five nearest training images.
        top1_style: Share whose nearest training image has name and style, among prompts with a style; None if there are
            none.
        distance: Median distance to the nearest requested training image, in units of the typical distance between
            neighbouring names: 0 is that image, 1 as far off as another name's.
        mmd2: Polynomial-kernel MMD^2 (`harness.metrics.mmd`); None for fewer than 8 names.
        mmd2_real: The score between two sets of as many real names: median and middle 95 %.
    """

    gallery: str
    scored: int
    unscored: int
    names: int
    chance: float
    top1: Share
    top5: Share
    top1_style: Share | None
    distance: IntervalEstimate
    mmd2: IntervalEstimate | None
    mmd2_real: IntervalEstimate | None


@dataclass(frozen=True)
class GalleryScore:
    """The scores of one image.

    Attributes:
        top1: Whether the nearest training image has the requested name.
        distance: Distance to the nearest requested training image, in units of the typical distance between names.
    """

    top1: bool
    distance: float


@dataclass(frozen=True)
class GalleryPrompt:
    """A prompt as name and style of the gallery."""

    name: str
    style: str | None


def parse_prompt(prompt: str, gallery: Gallery) -> GalleryPrompt | None:
    """Parse `name` or `name, style` of the gallery, in any case; return None for any other prompt."""
    words = " ".join(prompt.lower().split())
    if words in gallery.names:
        return GalleryPrompt(words, None)
    name, _, style = (part.strip() for part in words.rpartition(","))
    return GalleryPrompt(name, style) if (name, style) in zip(gallery.names, gallery.styles, strict=True) else None


def score_image(gallery: Gallery, image: NDArray[np.uint8], prompt: str) -> GalleryScore | None:
    """Score one 8-bit image, as `score` does for many.

    Args:
        gallery: The training images.
        image: Image (H, W, 3).
        prompt: The prompt.

    Returns:
        The scores, or None if the prompt is none of the gallery's.

    Raises:
        GalleryError: The image has a side that is no multiple of 32 pixels.
    """
    wanted = parse_prompt(prompt, gallery)
    if wanted is None:
        return None
    distance = gallery.distances(gallery.project(image[None]))[0]
    own = distance[gallery.matches(wanted.name, wanted.style)].min() / gallery.spacing
    return GalleryScore(gallery.names[int(distance.argmin())] == wanted.name, float(own))


def score(gallery: Gallery, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> Quality | None:
    """Score 8-bit images generated for these prompts.

    Args:
        gallery: The training images.
        images: Images (H, W, 3).
        prompts: The prompt of each image.

    Returns:
        The scores, or None if no prompt is one of the gallery's.

    Raises:
        GalleryError: Images have sides that are not multiples of 32 pixels.
    """
    parsed = [parse_prompt(prompt, gallery) for prompt in prompts]
    places = [number for number, each in enumerate(parsed) if each is not None]
    wanted = [each for each in parsed if each is not None]
    if not wanted:
        return None
    z = np.concatenate([gallery.project(np.stack(part)) for part in _parts(images[number] for number in places)])
    distance = gallery.distances(z)
    near = np.argsort(distance, axis=1)[:, :5]
    hit = np.array(gallery.names)[near] == np.array([each.name for each in wanted])[:, None]
    matches = np.stack([gallery.matches(each.name, each.style) for each in wanted])
    styled = np.array([each.style is not None for each in wanted])
    whole = matches[np.arange(len(wanted)), near[:, 0]] & styled
    group = np.unique([each.name for each in wanted], return_inverse=True)[1]
    own = np.where(matches, distance, np.inf).min(axis=1) / gallery.spacing
    names = int(group.max()) + 1
    return Quality(
        gallery=gallery.digest,
        scored=len(wanted),
        unscored=len(parsed) - len(wanted),
        names=names,
        chance=1.0 / len(set(gallery.names)),
        top1=wilson(int(hit[:, 0].sum()), len(hit)),
        top5=wilson(int(hit.any(axis=1).sum()), len(hit)),
        top1_style=wilson(int(whole.sum()), int(styled.sum())) if styled.any() else None,
        distance=median(own.tolist(), group.tolist()),
        mmd2=mmd.paired(gallery, z, matches, group),
        mmd2_real=mmd.real_against_real(gallery, names),
    )


def _parts(images: Iterable[NDArray[np.uint8]]) -> Iterator[list[NDArray[np.uint8]]]:
    """Yield consecutive images of one size, at most CHUNK at once."""
    part: list[NDArray[np.uint8]] = []
    for image in images:
        if part and (image.shape != part[0].shape or len(part) == CHUNK):
            yield part
            part = []
        part.append(image)
    if part:
        yield part
