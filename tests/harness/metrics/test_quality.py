"""Scores find what was planted: closed forms for the intervals, brute force for MMD^2, controls at both ends."""

import subprocess
import sys
from dataclasses import replace
from math import comb
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from harness.client.build_record import score_quality
from harness.loggers.scalars import quality_scalars
from harness.loggers.table import print_quality
from harness.metrics import mmd
from harness.metrics.gallery import FILE, Gallery, GalleryError
from harness.metrics.intervals import median, wilson
from harness.metrics.quality import parse_prompt, score
from harness.resolve.compose import compose_run
from models.registry import REFERENCE

ROOT = Path(__file__).parents[3]
SHIPPED = REFERENCE / "emoji" / FILE
STYLES = ("noto", "3d")


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    """Return coarse random images: 40 names in two styles that look alike."""
    rng = np.random.default_rng(0)
    pattern = rng.integers(40, 216, (40, 1, 4, 1, 4, 1, 3))
    styled = pattern + rng.integers(-30, 31, (40, 2, 4, 1, 4, 1, 3))
    return np.broadcast_to(styled, (40, 2, 4, 16, 4, 16, 3)).reshape(80, 64, 64, 3).astype(np.uint8)


@pytest.fixture(scope="module")
def gallery(pixels: NDArray[np.uint8]) -> Gallery:
    return Gallery.build(pixels, [f"name {i // 2}" for i in range(80)], STYLES * 40, components=16)


def prompts(gallery: Gallery) -> list[str]:
    return [f"{name}, {style}" for name, style in zip(gallery.names, gallery.styles, strict=True)]


def noisy(pixels: NDArray[np.uint8], amount: int) -> NDArray[np.uint8]:
    noise = np.random.default_rng(1).integers(-amount, amount + 1, (len(pixels), 4, 1, 4, 1, 3))
    wide = np.broadcast_to(noise, (len(pixels), 4, 16, 4, 16, 3)).reshape(pixels.shape)
    return np.clip(pixels + wide, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634)]
)
def test_wilson_is_the_published_interval(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n).ci95 == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("p", [0.02, 0.5, 0.9])
def test_wilson_covers_a_share_about_as_often_as_it_says(p: float) -> None:
    n = 96
    covered = sum(
        comb(n, k) * p**k * (1 - p) ** (n - k)
        for k in range(n + 1)
        if wilson(k, n).ci95[0] <= p <= wilson(k, n).ci95[1]
    )
    assert 0.92 < covered < 0.98


@pytest.mark.parametrize(("hits", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_a_share_of_nothing_is_refused(hits: int, n: int) -> None:
    with pytest.raises(ValueError, match="hits of"):
        wilson(hits, n)


def test_the_medians_interval_resamples_whole_groups() -> None:
    values = np.random.default_rng(0).normal(size=60)
    apart = median(values.tolist(), list(range(60)))
    repeated = median(np.repeat(values, 10).tolist(), np.repeat(np.arange(60), 10).tolist())
    assert apart.value == repeated.value == pytest.approx(np.median(values))
    assert repeated.ci95 == apart.ci95  # ten copies of an image add no information
    assert apart.bounds[0] < 0 < apart.bounds[1]
    assert median([3.0] * 4, [0, 1, 2, 3]).ci95 == (3.0, 3.0)
    assert median([0.0, 10.0] * 20, [0, 1, 2, 3] * 10).ci95 == (0.0, 10.0)
    assert median([0.0, 10.0] * 20, [0, 1, 2, 2] * 10).ci95 is None  # three groups are too few for an interval


def test_the_requested_images_get_the_full_score(gallery: Gallery, pixels: NDArray[np.uint8]) -> None:
    found = score(gallery, list(pixels), prompts(gallery))
    assert found is not None
    assert found.top1_style is not None
    assert found.mmd2 is not None
    assert (found.scored, found.unscored, found.names, found.chance) == (80, 0, 40, 1 / 40)
    assert (found.top1.hits, found.top5.hits, found.top1_style.hits) == (80, 80, 80)
    assert found.distance.value < 1e-3
    assert found.mmd2.value == pytest.approx(0, abs=1e-4)


def test_the_wrong_style_is_the_right_name(gallery: Gallery, pixels: NDArray[np.uint8]) -> None:
    swapped = pixels.reshape(40, 2, 64, 64, 3)[:, ::-1].reshape(pixels.shape)
    found = score(gallery, list(swapped), prompts(gallery))
    assert found is not None
    assert found.top1_style is not None
    assert (found.top1.value, found.top1_style.value) == (1.0, 0.0)
    assert 0 < found.distance.value < 1
    either = score(gallery, list(swapped), list(gallery.names))
    assert either is not None
    assert either.top1_style is None
    assert either.distance.value < 1e-3


def test_the_wrong_name_scores_nothing(gallery: Gallery, pixels: NDArray[np.uint8]) -> None:
    found = score(gallery, list(np.roll(pixels, 2, axis=0)), prompts(gallery))
    assert found is not None
    assert (found.top1.hits, found.top1.n) == (0, 80)
    assert found.distance.bounds[0] > 1


def test_top5_counts_the_name_among_the_five_nearest(gallery: Gallery, pixels: NDArray[np.uint8]) -> None:
    blend = (0.6 * np.roll(pixels, 2, axis=0) + 0.4 * pixels).astype(np.uint8)
    found = score(gallery, list(blend), prompts(gallery))
    assert found is not None
    assert found.top1.hits == 0
    assert found.top5.hits > 60


def test_worse_images_score_worse(gallery: Gallery, pixels: NDArray[np.uint8]) -> None:
    scores = [score(gallery, list(noisy(pixels, amount)), prompts(gallery)) for amount in (5, 40, 120)]
    distances = [found.distance.value for found in scores if found is not None]
    gaps = [found.mmd2.value for found in scores if found is not None and found.mmd2 is not None]
    assert distances == sorted(distances)
    assert gaps == sorted(gaps)
    assert len(gaps) == 3
    assert scores[2] is not None
    assert scores[2].top1.value < 1


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("name 3", ("name 3", None)),
        ("name 3, 3d", ("name 3", "3d")),
        (" NAME 3 ,  NOTO ", ("name 3", "noto")),
        ("name 3, blob", None),
        ("name 99", None),
        ("a photo of name 3", None),
        (", 3d", None),
        ("", None),
    ],
)
def test_a_prompt_is_a_name_and_perhaps_a_style(
    gallery: Gallery, prompt: str, expected: tuple[str, str | None] | None
) -> None:
    found = parse_prompt(prompt, gallery)
    assert (None if found is None else (found.name, found.style)) == expected


def test_other_prompts_are_counted_and_left_out(gallery: Gallery, pixels: NDArray[np.uint8]) -> None:
    found = score(gallery, [pixels[0], pixels[9]], ["name 0", "a dragon in a teapot"])
    assert found is not None
    assert (found.scored, found.unscored, found.top1.hits) == (1, 1, 1)
    assert found.mmd2 is None  # one name gives no distribution
    assert score(gallery, [pixels[0]], ["a dragon in a teapot"]) is None


def test_images_of_another_size_are_averaged_or_refused(gallery: Gallery, pixels: NDArray[np.uint8]) -> None:
    twice = pixels[:2].repeat(2, axis=1).repeat(2, axis=2)
    found = score(gallery, list(twice), prompts(gallery)[:2])
    assert found is not None
    assert found.distance.value < 1e-3
    with pytest.raises(GalleryError, match="72 x 64 pixels"):
        score(gallery, [np.zeros((72, 64, 3), np.uint8)], ["name 0"])


def test_mmd2_is_the_papers_sum(gallery: Gallery, pixels: NDArray[np.uint8]) -> None:
    z = gallery.project(noisy(pixels, 60))[::2][:10]
    requested = [(gallery.names[2 * i], "noto" if i < 5 else None) for i in range(10)]
    matches = np.stack([gallery.matches(*each) for each in requested])
    found = mmd.paired(gallery, z, matches, np.arange(10))
    scale = float(np.mean([row @ row for row in gallery.z.astype(float)]))

    def k(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
        return float((a @ b / scale + 1) ** 3)

    real = [gallery.z[row].astype(float) for row in matches]
    total = 0.0
    for i in range(10):
        for j in range(10):
            if i != j:
                total += k(z[i], z[j]) + float(np.mean([k(a, b) for a in real[i] for b in real[j]]))
                total -= float(np.mean([k(z[i], b) for b in real[j]])) + float(np.mean([k(z[j], a) for a in real[i]]))
    assert found is not None
    assert found.value == pytest.approx(total / 90, rel=1e-9)
    assert found.bounds[0] < found.value < found.bounds[1]


def test_mmd2_is_unbiased_and_its_interval_covers(gallery: Gallery) -> None:
    """Pairs from one distribution average 0, which the biased sum would not; shifted ones are covered about 95 %."""
    rng, names, k = np.random.default_rng(0), 30, gallery.z.shape[1]
    spread = gallery.z.std(axis=0)

    def sample_gallery(shift: float) -> tuple[Gallery, NDArray[np.floating]]:
        real = rng.normal(size=(names, k)) * spread
        pairs = replace(gallery, z=real, names=tuple(f"{i}" for i in range(names)), styles=("noto",) * names)
        return pairs, (rng.normal(size=(names, k)) + shift) * spread

    def measure(shift: float) -> list[tuple[float, tuple[float, float]]]:
        found = [mmd.paired(*sample_gallery(shift), np.eye(names, dtype=bool), np.arange(names)) for _ in range(150)]
        return [(each.value, each.ci95) for each in found if each is not None]

    same = np.array([value for value, _ in measure(0.0)])
    assert abs(same.mean()) < 4 * same.std() / np.sqrt(len(same))
    shifted = measure(0.5)
    truth = np.mean([value for value, _ in shifted])
    assert truth > 4 * same.std()
    assert 0.85 < np.mean([low <= truth <= high for _, (low, high) in shifted]) <= 1.0


def test_real_against_real_is_around_zero_and_narrows(gallery: Gallery) -> None:
    few, many = mmd.real_against_real(gallery, 8), mmd.real_against_real(gallery, 20)
    assert few is not None
    assert many is not None
    assert few.bounds[0] < 0 < few.bounds[1]
    assert many.bounds[1] - many.bounds[0] < few.bounds[1] - few.bounds[0]
    assert mmd.real_against_real(gallery, 500) == many  # at most half of the gallery's names
    assert mmd.real_against_real(gallery, 7) is None


def test_images_of_one_name_are_never_compared(gallery: Gallery, pixels: NDArray[np.uint8]) -> None:
    z, matches = gallery.project(noisy(pixels, 60)), np.eye(80, dtype=bool)
    both = mmd.paired(gallery, z, matches, np.arange(80) // 2)
    apart = mmd.paired(gallery, z, matches, np.arange(80))
    assert both is not None
    assert apart is not None
    assert both.value != apart.value
    assert (both.n, apart.n) == (40, 80)


def test_a_gallery_comes_back_as_written(gallery: Gallery, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    gallery.save(tmp_path / FILE)
    back = Gallery.load(tmp_path / FILE)
    assert (back.names, back.styles, len(back.digest)) == (gallery.names, gallery.styles, 16)
    for name in ("mean", "basis", "z"):
        assert np.array_equal(getattr(back, name), getattr(gallery, name))
    assert np.array_equal(back.nearest(pixels, 1)[:, 0], np.arange(80))


@pytest.mark.parametrize("content", [b"", b"{}", b"\x10" + b"\0" * 7 + b"not json at all!"])
def test_a_file_that_is_no_gallery_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(GalleryError, match="not a readable gallery"):
        Gallery.load(tmp_path / FILE)


def test_the_basis_is_of_principal_components(gallery: Gallery) -> None:
    z = gallery.z.astype(np.float64)
    spread = z.T @ z / len(z)
    variance = np.diag(spread)
    assert np.abs(z.mean(axis=0)).max() < 1e-2 * np.sqrt(variance).max()
    assert np.abs(spread - np.diag(variance)).max() < 1e-3 * variance.max()
    assert (np.diff(variance) <= 0).all()


@pytest.mark.parametrize("part", ["names", "styles", "one name"])
def test_a_gallery_whose_parts_do_not_fit_is_refused(gallery: Gallery, tmp_path: Path, part: str) -> None:
    names = {"names": gallery.names[:-1], "one name": gallery.names[:1] * 80}.get(part, gallery.names)
    styles = gallery.styles[:-1] if part == "styles" else gallery.styles
    replace(gallery, names=names, styles=styles).save(tmp_path / FILE)
    with pytest.raises(GalleryError, match="is not a gallery"):
        Gallery.load(tmp_path / FILE)


def test_the_shipped_gallery_is_small_and_is_of_the_vocabulary() -> None:
    gallery = Gallery.load(SHIPPED)
    assert SHIPPED.stat().st_size < 1_000_000
    assert sorted(set(gallery.names)) == (SHIPPED.parent / "vocabulary.txt").read_text().split("\n")[:-1]
    assert set(gallery.styles) == set((SHIPPED.parent / "styles.txt").read_text().split())
    assert gallery.z.shape == (512, 64)
    assert np.array_equal(gallery.distances(gallery.z).argmin(axis=1), np.arange(512))


def test_the_families_experiment_asks_for_names_of_the_gallery_in_both_styles() -> None:
    gallery, prompts = Gallery.load(SHIPPED), compose_run(["experiment=families"]).config.request.prompts
    assert prompts is not None
    requested = [parse_prompt(prompt, gallery) for prompt in prompts]
    assert None not in requested
    assert len({each.name for each in requested if each is not None}) == 48
    assert [each.style for each in requested if each is not None].count("3d") == 24


def test_scoring_needs_no_torch(tmp_path: Path) -> None:
    code = f"""
import sys
import numpy as np
from pathlib import Path
from harness.metrics.gallery import Gallery
from harness.metrics.quality import score
found = score(Gallery.load(Path({str(SHIPPED)!r})), [np.zeros((64, 64, 3), np.uint8)], ["rocket, 3d"])
print(found.top1.hits, "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, check=True
    )
    assert done.stdout.split() == ["0", "False"]


def test_a_score_is_plain_json(gallery: Gallery, pixels: NDArray[np.uint8]) -> None:
    found = score(gallery, list(pixels[:20]), prompts(gallery)[:20])
    assert found is not None
    assert msgspec.json.decode(msgspec.json.encode(found), type=type(found)) == found


def floats(pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Return images as an engine returns them."""
    return [image.transpose(2, 0, 1).astype(np.float32) / 255 for image in pixels]


def test_an_answer_is_scored_in_its_checkpoints_gallery(
    gallery: Gallery, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    gallery.save(tmp_path / FILE)
    found, reasons = score_quality(tmp_path, floats(pixels[:2]), ["name 0", "name 0, 3d"])
    assert reasons == []
    assert found is not None
    assert (found.top1.hits, found.names, found.gallery) == (2, 1, Gallery.load(tmp_path / FILE).digest)


def test_what_is_not_scored_says_why(gallery: Gallery, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    def reason(prompt: str, images: NDArray[np.uint8]) -> str:
        found, reasons = score_quality(tmp_path, floats(images), [prompt])
        assert found is None
        (line,) = reasons
        return line

    assert "the checkpoint has no gallery.safetensors" in reason("name 0", pixels[:1])
    gallery.save(tmp_path / FILE)
    assert "no prompt is a name" in reason("teapot", pixels[:1])
    assert "72 x 64 pixels" in reason("name 0", np.zeros((1, 72, 64, 3), np.uint8))
    (tmp_path / FILE).write_bytes(b"")
    assert "not a readable gallery" in reason("name 0", pixels[:1])


def test_the_score_is_printed_and_mirrored(gallery: Gallery, pixels: NDArray[np.uint8]) -> None:
    found = score(gallery, [*pixels[:20], pixels[0]], [*prompts(gallery)[:20], "teapot"])
    assert found is not None
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_quality(found, console)
    shown = console.export_text()
    assert "top-1 (chance 2.5 %) 100.0 % 83.9 .. 100.0 %" in " ".join(shown.replace("│", " ").split())
    assert "1 more images are not scored" in shown
    scalars = quality_scalars(found)
    assert (scalars["quality_top1"], scalars["quality_unscored"]) == (1.0, 1)
    assert scalars["quality_top1_ci95_low"] == pytest.approx(0.839, abs=1e-3)
    assert scalars["quality_mmd2"] == found.mmd2.value if found.mmd2 is not None else False
    assert quality_scalars(None) == {}
