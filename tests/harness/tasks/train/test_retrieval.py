"""Retrieval: planted images are found, wrong ones are not, and the shares are the planted ones."""

import numpy as np
import pytest

from harness.tasks.train.retrieval import TrainingGallery, contact_sheet


@pytest.fixture
def gallery() -> TrainingGallery:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    coarse = pixels[:, ::16, ::16].repeat(16, axis=1).repeat(16, axis=2)
    names = [f"name {i // 2}" for i in range(40)]
    return TrainingGallery(coarse, names, ["noto", "3d"] * 20, components=16)


def test_noisy_training_images_are_found(gallery: TrainingGallery) -> None:
    noise = np.random.default_rng(1).integers(-20, 21, gallery.pixels.shape)
    noisy = np.clip(gallery.pixels.astype(int) + noise, 0, 255).astype(np.uint8)
    assert np.array_equal(gallery.nearest(noisy, 1)[:, 0], np.arange(40))


def test_score_counts_what_was_planted(gallery: TrainingGallery) -> None:
    names, styles = gallery.names.tolist(), gallery.styles.tolist()
    requested = names[:30] + ["another"] * 10
    score = gallery.score(gallery.pixels, requested, styles)
    assert (score.prompts, score.top1, score.top1_style, score.near_exact) == (40, 0.75, 0.75, 1.0)
    assert score.chance == pytest.approx(1 / 20)
    other = gallery.score(gallery.pixels, names, styles[::-1])
    assert (other.top1, other.top1_style) == (1.0, 0.0)


def test_grid_places_images_row_by_row() -> None:
    pixels = np.stack([np.full((2, 2, 3), i, np.uint8) for i in range(5)])
    sheet = contact_sheet(pixels, 3)
    assert sheet.shape == (4, 6, 3)
    assert sheet[::2, ::2, 0].tolist() == [[0, 1, 2], [3, 4, 255]]
