"""How much a model repeats its training images: prompt retrieval, and copies of training images.

A generated image counts if its nearest training image (`harness.metrics.gallery`) has the prompt's name in either
style. The share of near-exact training images and the PSNR to the nearest one are reported too, because this model is
meant to memorise. A run's own score, with intervals, is `harness.metrics.quality`, which needs the gallery alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.metrics import gallery

NEAR_EXACT_DB = 25.0  # PSNR at 64 x 64 above which an image counts as a copy of a training image


@dataclass(frozen=True)
class RetrievalScore:
    """The result over all prompts; shares are in [0, 1].

    Attributes:
        prompts: Number of prompts.
        top1: Share of images whose nearest training image has the prompt's name.
        top1_style: Share whose nearest training image has the prompt's name and style.
        top5: Share with the prompt's name among the five nearest training images.
        near_exact: Share with a PSNR to the nearest training image above NEAR_EXACT_DB.
        psnr_db: Median PSNR to the nearest training image, dB.
        chance: top1 of a random guess.
    """

    prompts: int
    top1: float
    top1_style: float
    top5: float
    near_exact: float
    psnr_db: float
    chance: float


class TrainingGallery:
    """Training images in principal components, and their pixels.

    Args:
        pixels: Training images, uint8 (N, H, W, 3), H and W multiples of 32.
        names: Name of each image.
        styles: Style of each image.
        components: Number of principal components.
    """

    def __init__(self, pixels: np.ndarray, names: Sequence[str], styles: Sequence[str], components: int = 64) -> None:
        self.pixels, self.names, self.styles = pixels, np.array(names), np.array(styles)
        self.gallery = gallery.Gallery.build(pixels, names, styles, components)

    def nearest(self, pixels: np.ndarray, count: int = 5) -> np.ndarray:
        """Return indices (M, count) of the nearest training images, nearest first."""
        return self.gallery.nearest(pixels, count)

    def score(self, pixels: np.ndarray, names: Sequence[str], styles: Sequence[str]) -> RetrievalScore:
        """Score generated images.

        Args:
            pixels: Generated images, uint8 (M, H, W, 3).
            names: Name in the prompt of each image.
            styles: Style in the prompt of each image.

        Returns:
            The score over all images.
        """
        near = self.nearest(pixels)
        hit = self.names[near] == np.array(names)[:, None]
        style = self.styles[near[:, 0]] == np.array(styles)
        psnr = psnr_db(pixels, self.pixels[near[:, 0]])
        return RetrievalScore(
            prompts=len(pixels),
            top1=float(hit[:, 0].mean()),
            top1_style=float((hit[:, 0] & style).mean()),
            top5=float(hit.any(axis=1).mean()),
            near_exact=float((psnr > NEAR_EXACT_DB).mean()),
            psnr_db=float(np.median(psnr)),
            chance=1.0 / len(set(self.names.tolist())),
        )


def psnr_db(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the PSNR in decibels of each pair of uint8 images (M, H, W, 3)."""
    error = (a.astype(np.float64) - b.astype(np.float64)) ** 2
    return 10.0 * np.log10(255.0**2 / np.maximum(error.mean(axis=(1, 2, 3)), 1e-6))


def contact_sheet(pixels: np.ndarray, columns: int) -> np.ndarray:
    """Arrange images (M, H, W, 3) on one sheet, row by row; empty places are white.

    Args:
        pixels: Images, uint8 (M, H, W, 3).
        columns: Images per row.

    Returns:
        The sheet, uint8 (rows * H, columns * W, 3).
    """
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height, width, channels), 255, np.uint8)
    sheet[:count] = pixels
    return (
        sheet.reshape(rows, columns, height, width, channels)
        .swapaxes(1, 2)
        .reshape(rows * height, columns * width, channels)
    )
