"""A distance between generated and real pictures that is unbiased at any number of them: polynomial-kernel MMD^2.

    k(a, b) = (a . b / s + 1)^3,    MMD^2 = mean over i != j of  k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)

for pairs (x_i, y_i) of a picture and the real one that was asked for: the one-sample U-statistic of Gretton et al. 2012
(JMLR 13, lemma 6), with the kernel of Binkowski et al. 2018 (arXiv:1801.01401). Theirs works on Inception features and
is called KID; here the features are principal components of pixels, so the numbers compare with nothing but each other.
A pair is never compared with itself, so a model that returns the real pictures scores exactly 0, and one that draws
other pictures of the same distribution 0 on average (single values may be negative). It does not ask whether a picture
fits its own prompt: retrieval does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from harness.metrics.gallery import Floats, Gallery
from harness.metrics.intervals import IntervalEstimate, interval, resample

MIN_NAMES = 8  # fewer say nothing
REAL_DRAWS = 200


def kernel(a: Floats, b: Floats, scale: float) -> Floats:
    """k (n, m) of components (n, k) and (m, k); `scale` is the mean square length of a real picture's."""
    return (a @ b.T / scale + 1.0) ** 3


def paired(gallery: Gallery, z: Floats, matches: NDArray[np.bool_], group: NDArray[np.intp]) -> IntervalEstimate | None:
    """MMD^2 of pictures against the rows they were asked to be, with a bootstrap interval over names.

    Near 0 the statistic is degenerate and the interval is wider than it need be, not narrower.

    Args:
        gallery: the real pictures.
        z: components (M, k) of the pictures.
        matches: (M, N), the rows that fit each prompt; where two styles do, y_i is either with equal weight.
        group: (M,), the number of each picture's name, from 0 without gaps; pairs of one name are left out.

    Returns:
        None for fewer than MIN_NAMES names.
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
    drawn = resample(names).astype(float)
    pairs = ((drawn @ count) * drawn).sum(axis=1)
    values = ((drawn @ total) * drawn).sum(axis=1)[pairs > 0] / pairs[pairs > 0]
    return IntervalEstimate(float(total.sum() / count.sum()), interval(values), names)


def real_against_real(gallery: Gallery, names: int) -> IntervalEstimate | None:
    """What two sets of real pictures of other names score against each other: median and middle 95 % of 200 draws.

    Each set has `names` names, or half of the gallery's where that is fewer, one row a name. Unpaired, by the
    two-sample estimator of the same paper. None for fewer than MIN_NAMES.
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
    for _ in range(REAL_DRAWS):
        chosen = rng.permutation(len(known))[: 2 * size]
        drawn = rows[first[chosen] + (rng.random(2 * size) * count[chosen]).astype(int)]
        values.append(unpaired(k[np.ix_(drawn, drawn)], size))
    return IntervalEstimate(float(np.median(values)), interval(np.array(values)), size)


def unpaired(k: Floats, size: int) -> float:
    """MMD^2 of two independent samples: k is the kernel (n, n) of both, the first `size` rows are the first sample."""
    x, y, cross = k[:size, :size], k[size:, size:], k[:size, size:]
    return float(_off_diagonal(x) + _off_diagonal(y) - 2 * cross.mean())


def _off_diagonal(k: Floats) -> float:
    return float((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)))


def _scale(gallery: Gallery) -> float:
    return float((gallery.z.astype(np.float64) ** 2).sum(axis=1).mean())
