"""Differences between answers against closed forms and torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from harness.metrics.difference import difference, ssim


def images(seed: int, *shape: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    smooth = rng.random(shape).astype(np.float32)
    return [smooth, (smooth + rng.normal(0, 0.05, shape).astype(np.float32)).clip(0, 1)]


def test_numbers_by_hand() -> None:
    found = difference([np.array([3.0, 0.0]), np.array([4.0])], [np.array([3.0, 0.5]), np.array([4.0])])
    assert (found.rel_l2, found.max_abs, found.identical) == (0.1, 0.5, False)
    assert found.psnr_db is None
    same = difference([np.ones(3)], [np.ones(3)], pixels=False)
    assert (same.rel_l2, same.identical) == (0.0, True)


@pytest.mark.parametrize("shape", [(3, 48, 64), (5, 3, 32, 40)])
def test_images_against_torchmetrics(shape: tuple[int, ...]) -> None:
    a, b = images(0, *shape)
    found = difference([a], [b], pixels=True)
    ours, theirs = (torch.from_numpy(x).reshape(-1, *shape[-3:]) for x in (a, b))
    assert found.psnr_db == pytest.approx(float(peak_signal_noise_ratio(theirs, ours, data_range=1.0)), rel=1e-5)
    expected = structural_similarity_index_measure(theirs, ours, data_range=1.0)
    assert found.ssim == pytest.approx(float(expected), abs=1e-5)


def test_equal_images_and_tiny_ones() -> None:
    a = images(1, 3, 8, 8)[0]
    found = difference([a], [a], pixels=True)
    assert (found.ssim, found.psnr_db, found.identical) == (1.0, None, True)
    assert 0 < ssim(a, 1 - a) + 1 < 1


def test_answers_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="same shapes"):
        difference([np.ones((3, 8, 8))], [np.ones((3, 8, 16))])
