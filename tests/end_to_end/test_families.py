"""Checkpoints shaped like SD3, FLUX and Wan on four ranks, from the command line: a ring of Ulysses pairs."""

from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import read_frames
from numpy.typing import NDArray
from PIL import Image

from tests.fixtures.commands import command, record_of, run, status_of
from tests.fixtures.models.checkpoints import CASES, overrides_of

HEADS = 3  # which Ulysses pairs share unevenly
REQUESTED = ["request.prompts=[a red fox,two small boats]", "request.negative_prompt=blurry", "request.seed=7"]
SIZES = {
    "sd35_medium": ["request.height=36", "request.width=20"],  # 9 x 5 tokens
    "flux": ["request.height=36", "request.width=20"],
    "wan": ["request.height=72", "request.width=40", "request.frames=5"],
}
FLOOR = {".png": 0.05, ".mp4": 1.0}  # mean of 255: single levels differ; a codec makes them larger


def frames(path: Path) -> NDArray[np.uint8]:
    """Return an image, or the frames of a video, as (..., height, width, 3)."""
    if path.suffix == ".png":
        return np.asarray(Image.open(path))
    found = read_frames(path)
    width, height = next(found)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in found])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SIZES))
def test_four_ranks_generate_what_one_generates(name: str, tmp_path: Path) -> None:
    CASES[name].save(tmp_path / "checkpoint", heads=HEADS)
    overrides = [*overrides_of(CASES[name], tmp_path / "checkpoint"), *REQUESTED, *SIZES[name]]
    for layout in ("single", "usp4"):
        done = run(command(*overrides, f"parallel={layout}", f"hydra.run.dir={tmp_path / layout}"))
        assert done.returncode == 0, done.stderr
        assert status_of(tmp_path / layout).state == "ok"
    one, four = record_of(tmp_path / "single"), record_of(tmp_path / "usp4")
    assert len(four.summary.peak_memory_mib) == 4
    assert {"parallel=single"} < set(one.overrides)
    assert {"parallel=usp4"} < set(four.overrides)
    assert one.summary.comm == {}
    for stage in ("denoising", "decoding"):
        assert all(traffic.bytes > 0 for traffic in four.summary.comm[stage].values())
    assert len(four.samples) == 2
    for row, other in zip(one.samples, four.samples, strict=True):
        ours, theirs = frames(tmp_path / "usp4" / other.path), frames(tmp_path / "single" / row.path)
        assert ours.shape == theirs.shape
        assert theirs.std() > 5, "a flat picture proves nothing"
        assert np.abs(ours.astype(int) - theirs).mean() <= FLOOR[Path(row.path).suffix], (name, row.path)
