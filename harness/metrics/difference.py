"""How far two answers to one request are apart, in numbers that have names."""

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
    """Of b from a, over everything that an answer holds.

    rel_l2 = |b - a| / |a|; `psnr_db` and `ssim` are of pixels in [0, 1], and null where they are not asked for; the
    PSNR of equal pictures is null too. `identical` says that every bit is the same.
    """

    rel_l2: float
    max_abs: float
    psnr_db: float | None = None
    ssim: float | None = None
    identical: bool = False


def difference(a: Sequence[AnyArray], b: Sequence[AnyArray], pixels: bool = False) -> Difference:
    """Of one list of arrays from another of the same shapes.

    Args:
        a: the reference.
        b: what is held against it.
        pixels: the arrays are pictures (3, H, W) or videos (F, 3, H, W) in [0, 1].

    Raises:
        ValueError: lists or arrays that do not correspond.
    """
    if [x.shape for x in a] != [x.shape for x in b]:
        raise ValueError("the two answers do not have the same shapes; ask both for the same sizes and prompts")
    left, right = (np.concatenate([x.ravel() for x in side]).astype(np.float64) for side in (a, b))
    apart = right - left
    squares, size = float(np.square(apart).sum()), float(np.square(left).sum())
    same = all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    return Difference(
        rel_l2=math.sqrt(squares / size) if size else (0.0 if not squares else math.inf),
        max_abs=float(np.abs(apart).max(initial=0.0)),
        psnr_db=10 * math.log10(len(apart) / squares) if pixels and squares else None,
        ssim=float(np.mean([ssim(x, y) for x, y in zip(a, b, strict=True)])) if pixels else None,
        identical=same,
    )


def ssim(a: AnyArray, b: AnyArray) -> float:
    """Structural similarity of two pictures (..., H, W) in [0, 1], a mean over channels, frames and pixels.

    Source: Wang et al. 2004 ("Image quality assessment: from error visibility to structural similarity", eq. 13), with
    their constants and Gaussian window; beyond its edges the picture is mirrored, as in torchmetrics.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    both = _blurred(x * y) - mean_x * mean_y
    similar = (2 * mean_x * mean_y + C1) * (2 * both + C2) / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))
    return float(similar.mean())


def _blurred(x: NDArray[np.float64]) -> NDArray[Any]:
    from scipy.ndimage import gaussian_filter

    sigmas = [0.0] * (x.ndim - 2) + [WINDOW_SIGMA] * 2
    found: NDArray[Any] = gaussian_filter(x, sigmas, radius=WINDOW_RADIUS, mode="mirror")
    return found
