"""How good are the pictures? Retrieval by their prompt and two distances to the pictures that were asked for.

Everything is measured in a gallery of training pictures (`harness.metrics.gallery`) on 8-bit pictures, after all timed
work, with numpy. The extractor is principal components of pixels: it serves to compare samplers of one small model,
and for a model that remembers its training pictures it says how well it remembers them. None of it is FID or KID.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from harness.metrics import mmd
from harness.metrics.gallery import Gallery
from harness.metrics.intervals import IntervalEstimate, Share, median, wilson


class Quality(msgspec.Struct, frozen=True):
    """`quality` of the record. Shares have Wilson's 95 % interval, the distances a bootstrap interval over names.

    gallery: first digits of the gallery file's sha256; scores of different galleries do not compare.
    scored, unscored: pictures whose prompt is `name` or `name, style` of the gallery, and the others.
    names: different names among the scored.
    chance: top-1 of a random guess.
    top1, top5: the nearest, or one of the five nearest, training pictures has the name asked for.
    top1_style: the nearest has name and style, among prompts with a style; None where there are none.
    distance: median distance to the nearest training picture asked for, in units of the typical distance between
        neighbouring names: 0 is that picture, 1 as far off as another name's.
    mmd2: polynomial-kernel MMD^2 (`harness.metrics.mmd`); None for fewer than 8 names.
    mmd2_real: what two sets of as many real names score, median and middle 95 %.
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
class GalleryPrompt:
    """A prompt in the gallery's words."""

    name: str
    style: str | None


def parse_prompt(prompt: str, gallery: Gallery) -> GalleryPrompt | None:
    """`name` or `name, style` in the gallery's words, upper case as lower; None for any other prompt."""
    words = " ".join(prompt.lower().split())
    if words in gallery.names:
        return GalleryPrompt(words, None)
    name, _, style = (part.strip() for part in words.rpartition(","))
    return GalleryPrompt(name, style) if (name, style) in zip(gallery.names, gallery.styles, strict=True) else None


def score(gallery: Gallery, pictures: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> Quality | None:
    """Scores 8-bit pictures (H, W, 3) drawn for these prompts; None where no prompt is in the gallery's words.

    Raises:
        GalleryError: pictures whose sides are not multiples of 32 pixels.
    """
    understood = [(picture, parse_prompt(prompt, gallery)) for picture, prompt in zip(pictures, prompts, strict=True)]
    scored = [(picture, asked) for picture, asked in understood if asked is not None]
    if not scored:
        return None
    asked = [each for _, each in scored]
    z = gallery.project(np.stack([picture for picture, _ in scored]))
    distance = gallery.distances(z)
    near = np.argsort(distance, axis=1)[:, :5]
    hit = np.array(gallery.names)[near] == np.array([each.name for each in asked])[:, None]
    matches = np.stack([gallery.matches(each.name, each.style) for each in asked])
    styled = np.array([each.style is not None for each in asked])
    whole = matches[np.arange(len(asked)), near[:, 0]] & styled
    group = np.unique([each.name for each in asked], return_inverse=True)[1]
    own = np.where(matches, distance, np.inf).min(axis=1) / gallery.spacing
    names = int(group.max()) + 1
    return Quality(
        gallery=gallery.digest,
        scored=len(scored),
        unscored=len(pictures) - len(scored),
        names=names,
        chance=1.0 / len(set(gallery.names)),
        top1=wilson(int(hit[:, 0].sum()), len(hit)),
        top5=wilson(int(hit.any(axis=1).sum()), len(hit)),
        top1_style=wilson(int(whole.sum()), int(styled.sum())) if styled.any() else None,
        distance=median(own.tolist(), group.tolist()),
        mmd2=mmd.paired(gallery, z, matches, group),
        mmd2_real=mmd.real_against_real(gallery, names),
    )
