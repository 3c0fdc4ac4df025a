"""The difference between two answers to one request, in numbers with established names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from harness.messages import AnyArray

WINDOW_SIGMA, WINDOW_RADIUS = 1.5, 5  # SSIM's Gaussian window of 11 x 11 pixels
C1, C2 = 0.01**2, 0.03**2


class Difference(msgspec.Struct, frozen=True):
    """The difference of b from a, over everything that an answer holds.

    Attributes:
        rel_l2: Relative L2 error, |b - a| / |a|.
        max_abs: Largest absolute error.
        psnr_db: Peak signal-to-noise ratio of pixels in [0, 1], dB; None if it was not requested, or for equal images.
        ssim: Structural similarity of pixels in [0, 1]; None if it was not requested.
        identical: Whether every bit is the same.
    """

    rel_l2: float
    max_abs: float
    psnr_db: float | None = None
    ssim: float | None = None
    identical: bool = False


def difference(a: Sequence[AnyArray], b: Sequence[AnyArray], pixels: bool = False) -> Difference:
    """Return the difference between two lists of arrays with the same shapes.

    Args:
        a: The reference.
        b: The arrays that are compared with it.
        pixels: Whether the arrays are images (3, H, W) or videos (F, 3, H, W) in [0, 1].

    Returns:
        The difference over all arrays.

    Raises:
        ValueError: The lists or the arrays do not correspond.
    """
    if [x.shape for x in a] != [x.shape for x in b]:
        raise ValueError("the two answers do not have the same shapes; give both the same sizes and prompts")
    left, right = (np.concatenate([x.ravel() for x in side]).astype(np.float64) for side in (a, b))
    error = right - left
    squares, size = float(np.square(error).sum()), float(np.square(left).sum())
    same = all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    return Difference(
        rel_l2=math.sqrt(squares / size) if size else (0.0 if not squares else math.inf),
        max_abs=float(np.abs(error).max(initial=0.0)),
        psnr_db=10 * math.log10(len(error) / squares) if pixels and squares else None,
        ssim=float(np.mean([ssim(x, y) for x, y in zip(a, b, strict=True)])) if pixels else None,
        identical=same,
    )


def ssim(a: AnyArray, b: AnyArray) -> float:
    """Return the structural similarity of two images (..., H, W) in [0, 1], a mean over channels, frames and pixels.

    Source: Wang et al. 2004 ("Image quality assessment: from error visibility to structural similarity", eq. 13), with
    their constants and Gaussian window. Beyond its edges the image is mirrored, as in torchmetrics.

    Args:
        a: One image.
        b: The other image.

    Returns:
        The similarity, 1 for equal images.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    both = _blur(x * y) - mean_x * mean_y
    similar = (2 * mean_x * mean_y + C1) * (2 * both + C2) / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))
    return float(similar.mean())


def _blur(x: NDArray[np.float64]) -> NDArray[Any]:
    from scipy.ndimage import gaussian_filter

    sigmas = [0.0] * (x.ndim - 2) + [WINDOW_SIGMA] * 2
    found: NDArray[Any] = gaussian_filter(x, sigmas, radius=WINDOW_RADIUS, mode="mirror")
    return found
