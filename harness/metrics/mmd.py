"""A distance between generated and real images that is unbiased at any number of images: polynomial-kernel MMD^2.

    k(a, b) = (a . b / s + 1)^3,    MMD^2 = mean over i != j of  k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)

for pairs (x_i, y_i) of an image and the real one that was requested: the one-sample U-statistic of Gretton et al. 2012
(JMLR 13, lemma 6), with the kernel of Binkowski et al. 2018 (arXiv:1801.01401). Theirs works on Inception features and
is called KID. Here the features are principal components of pixels, so the numbers compare only with each other.
A pair is never compared with itself. So a model that returns the real images scores exactly 0. One that generates other
images of the same distribution scores 0 on average (single values may be negative). The distance does not check whether
an image fits its own prompt: retrieval does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from harness.metrics.gallery import Floats, Gallery
from harness.metrics.intervals import IntervalEstimate, interval, resample

MIN_NAMES = 8  # fewer names are not meaningful
REAL_SAMPLES = 200


def kernel(a: Floats, b: Floats, scale: float) -> Floats:
    """Return the kernel k (n, m) of components (n, k) and (m, k); `scale` is a real image's mean squared length."""
    return (a @ b.T / scale + 1.0) ** 3


def paired(gallery: Gallery, z: Floats, matches: NDArray[np.bool_], group: NDArray[np.intp]) -> IntervalEstimate | None:
    """Return the MMD^2 of images against the requested rows, with a bootstrap interval over names.

    Near 0 the statistic is degenerate and the interval is wider than necessary, not narrower.

    Args:
        gallery: The real images.
        z: Components of the images, (M, k).
        matches: Rows that fit each prompt, (M, N); if two styles do, y_i is either with equal weight.
        group: Number of each image's name, from 0 without gaps, (M,); pairs of one name are left out.

    Returns:
        The distance, or None for fewer than MIN_NAMES names.
    """
    names = int(group.max()) + 1
    if names < MIN_NAMES:
        return None
    scale, rows = _scale(gallery), matches.any(axis=0)
    y = gallery.z[rows].astype(np.float64)
    weight = matches[:, rows] / matches[:, rows].sum(axis=1, keepdims=True)
    cross = kernel(z, y, scale) @ weight.T
    h = kernel(z, z, scale) + weight @ kernel(y, y, scale) @ weight.T - cross - cross.T
    member = np.eye(names)[:, group]
    total, count = member @ h @ member.T, member @ np.ones_like(h) @ member.T
    np.fill_diagonal(total, 0.0)
    np.fill_diagonal(count, 0.0)
    counts = resample(names).astype(float)
    pairs = ((counts @ count) * counts).sum(axis=1)
    values = ((counts @ total) * counts).sum(axis=1)[pairs > 0] / pairs[pairs > 0]
    return IntervalEstimate(float(total.sum() / count.sum()), interval(values, names), names)


def real_against_real(gallery: Gallery, names: int) -> IntervalEstimate | None:
    """Return what two sets of real images of different names score: the median and middle 95 % of 200 samples.

    Each set has `names` names, or half of the gallery's if that is fewer, and one row per name. It is unpaired, by the
    two-sample estimator of the same paper.

    Args:
        gallery: The real images.
        names: Number of names per set.

    Returns:
        The distance, or None for fewer than MIN_NAMES names.
    """
    known = sorted(set(gallery.names))
    size = min(names, len(known) // 2)
    if size < MIN_NAMES:
        return None
    rng, z = np.random.default_rng(0), gallery.z.astype(np.float64)
    k = kernel(z, z, _scale(gallery))
    rows = np.argsort(gallery.names, kind="stable")  # name by name, in the order of `known`
    count = np.unique(gallery.names, return_counts=True)[1]
    first = count.cumsum() - count
    values = []
    for _ in range(REAL_SAMPLES):
        chosen = rng.permutation(len(known))[: 2 * size]
        sampled = rows[first[chosen] + (rng.random(2 * size) * count[chosen]).astype(int)]
        values.append(unpaired(k[np.ix_(sampled, sampled)], size))
    return IntervalEstimate(float(np.median(values)), interval(np.array(values), REAL_SAMPLES), size)


def unpaired(k: Floats, size: int) -> float:
    """Return the MMD^2 of two independent samples.

    Args:
        k: Kernel of both samples together, (n, n).
        size: Number of rows of the first sample, which come first.

    Returns:
        The distance.
    """
    x, y, cross = k[:size, :size], k[size:, size:], k[:size, size:]
    return float(_off_diagonal(x) + _off_diagonal(y) - 2 * cross.mean())


def _off_diagonal(k: Floats) -> float:
    return float((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)))


def _scale(gallery: Gallery) -> float:
    return float((gallery.z.astype(np.float64) ** 2).sum(axis=1).mean())
