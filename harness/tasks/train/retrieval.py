"""How much does a model repeat its training pictures? Prompt retrieval, and what only the pictures themselves can say.

A generated picture counts when its nearest training picture (`harness.metrics.gallery`) has the prompt's name in either
style. The share of near-exact training pictures and the PSNR to the nearest one stand beside it, because this model is
meant to remember. A run's own score, with intervals, is `harness.metrics.quality`, which needs the gallery alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.metrics import gallery

NEAR_EXACT_DB = 25.0  # PSNR at 64 x 64 from which a picture counts as a training picture again


@dataclass(frozen=True)
class Score:
    """The result over all prompts; shares in [0, 1]."""

    prompts: int
    top1: float  # nearest training picture has the prompt's name
    top1_style: float  # and its style
    top5: float  # one of the five nearest has the prompt's name
    near_exact: float  # PSNR to the nearest training picture above NEAR_EXACT_DB
    psnr_db: float  # median PSNR to the nearest training picture
    chance: float  # top1 of a random guess


class Gallery:
    """Training pictures in principal components, and the pictures themselves.

    Args:
        pixels: uint8 (N, H, W, 3), H and W multiples of 32.
        names, styles: of each picture.
        components: kept principal components.
    """

    def __init__(self, pixels: np.ndarray, names: Sequence[str], styles: Sequence[str], components: int = 64) -> None:
        self.pixels, self.names, self.styles = pixels, np.array(names), np.array(styles)
        self.rows = gallery.Gallery.build(pixels, names, styles, components)

    def nearest(self, pixels: np.ndarray, count: int = 5) -> np.ndarray:
        """Indices (M, count) of the nearest training pictures, nearest first."""
        return self.rows.nearest(pixels, count)

    def score(self, pixels: np.ndarray, names: Sequence[str], styles: Sequence[str]) -> Score:
        """Score uint8 pictures (M, H, W, 3) drawn for prompts of these names and styles."""
        near = self.nearest(pixels)
        hit = self.names[near] == np.array(names)[:, None]
        style = self.styles[near[:, 0]] == np.array(styles)
        psnr = psnr_db(pixels, self.pixels[near[:, 0]])
        return Score(
            prompts=len(pixels),
            top1=float(hit[:, 0].mean()),
            top1_style=float((hit[:, 0] & style).mean()),
            top5=float(hit.any(axis=1).mean()),
            near_exact=float((psnr > NEAR_EXACT_DB).mean()),
            psnr_db=float(np.median(psnr)),
            chance=1.0 / len(set(self.names.tolist())),
        )


def psnr_db(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """PSNR in decibels of each pair of uint8 pictures (M, H, W, 3)."""
    error = (a.astype(np.float64) - b.astype(np.float64)) ** 2
    return 10.0 * np.log10(255.0**2 / np.maximum(error.mean(axis=(1, 2, 3)), 1e-6))


def grid(pixels: np.ndarray, columns: int) -> np.ndarray:
    """Pictures (M, H, W, 3) as one sheet, row by row, white where there is none."""
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height, width, channels), 255, np.uint8)
    sheet[:count] = pixels
    return (
        sheet.reshape(rows, columns, height, width, channels)
        .swapaxes(1, 2)
        .reshape(rows * height, columns * width, channels)
    )
