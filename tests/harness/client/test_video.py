"""A video from the request to the run's folder: MP4, metadata, grid, record and wandb's copy, all of one video."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import read_frames
from numpy.typing import NDArray
from PIL import Image

from harness.cli import dispatch
from harness.client.build_record import score_pretrained
from harness.client.generator import DiffusionGenerator
from harness.config.schema import QualityConfig
from harness.engines.protocol import RequestFailed
from harness.records.media import GAP, ffmpeg, grid, pixel_hash, save_mp4, still, to_uint8
from harness.records.record import Record, fingerprint, read_record, read_status
from harness.resolve.compose import ConfigError, compose_run, to_dict
from tests.fixtures.models.wan import OVERRIDES, tiny_wan

PROMPTS = ["a red fox", "two owls = one; #owl ü 🦊"]
LAUNCH = ["launch.mode=inprocess", "launch.threads_per_rank=1", "attention=math"]
PUBLISHED_NEGATIVE = "ce96e0324e4b54ce"  # digest of sample_neg_prompt in wan/configs/shared_config.py of Wan 2.1
REQUESTED = ["request.height=32", "request.width=48", "request.frames=9", "request.steps=2", "model.fps=12"]


def waves(frames: int, height: int, width: int) -> NDArray[np.uint8]:
    """Return a smooth image that moves, every channel in its own way."""
    f, y, x = np.mgrid[0:frames, 0:height, 0:width]
    channels = [np.sin(x / 9 + f / 3), np.cos(y / 7 - f / 4), np.sin((x + y) / 11 + f / 5)]
    return (127.5 + 110 * np.stack(channels, axis=-1)).astype(np.uint8)


def read(path: Path) -> tuple[dict[str, object], NDArray[np.uint8]]:
    """Return what ffmpeg reports of a video, and its frames (F, H, W, 3)."""
    found = read_frames(path)
    about = next(found)
    width, height = about["size"]
    return about, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in found])


def metadata(path: Path) -> str:
    """Return the metadata of a video, as ffmpeg writes it."""
    command = [ffmpeg(), "-v", "error", "-i", str(path), "-f", "ffmetadata", "-"]
    return subprocess.run(command, capture_output=True, check=True).stdout.decode()


def error(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> float:
    """Return the mean absolute difference, of 255."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours.astype(int) - theirs).mean())


@pytest.mark.parametrize(("frames", "height", "width", "fps"), [(9, 32, 48, 16), (5, 64, 16, 24), (1, 16, 16, 8)])
def test_an_mp4_reads_back(tmp_path: Path, frames: int, height: int, width: int, fps: int) -> None:
    video = waves(frames, height, width)
    save_mp4(tmp_path / "a.mp4", video, fps, {})
    about, back = read(tmp_path / "a.mp4")
    assert (about["codec"], about["size"], about["fps"]) == ("h264", (width, height), fps)
    assert str(about["pix_fmt"]).startswith("yuv420p(tv, bt709")
    assert error(back, video) < 5  # chroma is stored at half the size
    for k in range(1, frames):
        assert error(back[k], video[k]) < error(back[k], video[k - 1])


def test_flat_colours_come_back(tmp_path: Path) -> None:
    colours = np.array([[200, 30, 40], [20, 180, 60], [128, 128, 128], [255, 255, 255], [0, 0, 0]], np.uint8)
    video = np.broadcast_to(colours[:, None, None], (5, 32, 32, 3))
    save_mp4(tmp_path / "a.mp4", video, 16, {})
    assert np.abs(read(tmp_path / "a.mp4")[1].astype(int) - video).max() <= 3


def test_an_odd_width_is_made_even(tmp_path: Path) -> None:
    video = waves(3, 33, 47)
    save_mp4(tmp_path / "a.mp4", video, 16, {})
    about, back = read(tmp_path / "a.mp4")
    assert about["size"] == (48, 34)
    assert error(back[:, :33, :47], video) < 5
    assert error(back[:, 33], back[:, 32]) < 8


def test_an_mp4_says_what_it_is(tmp_path: Path) -> None:
    prompt = 'naïve "日本" = 1; #2 \\ \n🍎\0'
    save_mp4(tmp_path / "a.mp4", waves(2, 16, 16), 16, {"prompt": prompt, "seed": "7", "fingerprint": "0123"})
    lines = metadata(tmp_path / "a.mp4")
    assert 'prompt=naïve "日本" \\= 1\\; \\#2 \\\\ \\\n🍎 \n' in lines  # as ffmpeg escapes it
    assert "\nseed=7\n" in lines
    assert "\nfingerprint=0123\n" in lines


def test_a_video_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory"):
        save_mp4(tmp_path / "no such folder" / "a.mp4", waves(2, 16, 16), 16, {})


def test_a_video_is_refused_where_nothing_could_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ConfigError, match=r"pip install 'triptych\[video\]'"):
        compose_run(["model=wan_1_3b", "model.load=dummy"])
    assert compose_run(["model=wan_1_3b", "model.load=dummy", "request.frames=1"]).config.request.frames == 1


def test_a_grid_shows_first_middle_and_last_frame() -> None:
    video = np.stack([np.full((128, 128, 3), value, np.uint8) for value in (10, 60, 110, 160, 210)])
    assert still(video).shape == (128, 384, 3)
    sheet = np.asarray(grid([still(video)], ["a"]))
    shown = [int(sheet[GAP + 64, GAP + 128 * k + 64, 0]) for k in range(3)]
    assert shown == [10, 110, 210]
    assert still(video[0]).shape == (128, 128, 3)


def test_pixels_of_videos_are_those_of_their_frames() -> None:
    pixels = np.random.default_rng(0).uniform(size=(3, 3, 4, 5)).astype(np.float32)
    assert to_uint8(pixels).shape == (3, 4, 5, 3)
    assert all(np.array_equal(to_uint8(pixels)[k], to_uint8(pixels[k])) for k in range(3))
    assert pixel_hash(to_uint8(pixels)) != pixel_hash(to_uint8(pixels[::-1]))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    tiny_wan().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def overrides(checkpoint: Path) -> list[str]:
    prompts = "request.prompts=" + json.dumps(PROMPTS, ensure_ascii=False)
    return [*OVERRIDES, f"model.path={checkpoint}", *REQUESTED, prompts, *LAUNCH]


@pytest.fixture(scope="module")
def run(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of one run from the command line."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert dispatch([*overrides, f"hydra.run.dir={folder}", "logger.wandb.mode=offline"]) == 0
    return folder


@pytest.fixture(scope="module")
def generator(overrides: list[str]) -> Iterator[DiffusionGenerator]:
    with DiffusionGenerator.from_config(*overrides, "logger=json") as generator:
        yield generator


def record_of(run: Path) -> Record:
    record = read_record(run)
    assert record is not None
    return record


def test_the_command_line_leaves_a_video_of_each_prompt(run: Path, generator: DiffusionGenerator) -> None:
    record, generated = record_of(run), generator.generate()
    assert read_status(run).state == "ok"
    assert [row.path for row in record.samples] == ["samples/0000.mp4", "samples/0001.mp4"]
    assert [row.prompt for row in record.samples] == PROMPTS
    assert [row.seed for row in record.samples] == [0, 1]
    for row, video in zip(record.samples, generated.videos, strict=True):
        assert row.sha256 == pixel_hash(video)
        about, back = read(run / row.path)
        assert (about["size"], about["fps"], len(back)) == ((48, 32), 12, 9)
        assert error(back, video) < 0.2 * error(back, np.full_like(back, 128))
        assert f"fingerprint={record.fingerprint}" in metadata(run / row.path)
        assert f"seed={row.seed}" in metadata(run / row.path)
    assert "prompt=a red fox\n" in metadata(run / record.samples[0].path)
    with Image.open(run / "grid.png") as sheet:
        assert sheet.width > 2 * 3 * 48


def test_the_record_says_what_was_generated(run: Path) -> None:
    record = record_of(run)
    assert record.config["request"]["frames"] == 9
    assert record.config["model"]["fps"] == 12
    assert "videos" in next(note for note in record.notes if note.startswith("quality is not scored"))
    assert record.quality is None
    assert record.summary.nfe == 2
    assert record.fingerprint == fingerprint(record.config)
    assert {"imageio-ffmpeg", "ftfy"} <= set(record.provenance.packages)


def test_wandb_has_the_videos(run: Path) -> None:
    media = next((run / "wandb").glob("offline-run-*/files/media"))
    kept = sorted(path.read_bytes() for path in media.rglob("*.mp4"))
    assert kept == sorted(path.read_bytes() for path in (run / "samples").glob("*.mp4"))
    assert len(kept) == 2


def test_the_client_offers_frames(generator: DiffusionGenerator) -> None:
    generated = generator.generate(prompt="a red fox", frames=5)
    assert generated.pixels[0].shape == (5, 3, 32, 48)
    assert generated.images == []
    assert [video.shape for video in generated.videos] == [(5, 32, 48, 3)]
    assert generated.grid().width > 3 * 48
    assert "videos" in "".join(generated.record.notes)


@pytest.mark.parametrize(("frames", "near"), [(8, "9"), (85, "81")], ids=str)
def test_frames_that_the_vae_cannot_make_are_refused(
    overrides: list[str], generator: DiffusionGenerator, frames: int, near: str
) -> None:
    with pytest.raises(ConfigError, match=f"the nearest is {near}"):
        compose_run([*overrides, f"request.frames={frames}"])
    with pytest.raises(RequestFailed, match=f"the nearest is {near}"):
        generator.generate(frames=frames)


def test_scores_on_pretrained_weights_are_left_out_with_a_note() -> None:
    video = [np.zeros((5, 3, 8, 8), np.float32)]
    assert score_pretrained(QualityConfig(), video, ["a"]) == (None, [])
    assert "these are videos" in score_pretrained(QualityConfig(clip="folder"), video, ["a"])[1][0]


def test_random_weights_need_configurations_only(checkpoint: Path, overrides: list[str], tmp_path: Path) -> None:
    """model.load=dummy from the command line needs no weights and no tokenizer in the folder."""
    bare = shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    arguments = [*overrides, f"model.path={bare}", "model.load=dummy", "model.dtype=bfloat16", "request.prompts=[a,b]"]
    arguments += ["request.height=16", "request.width=16", "request.frames=5", "request.steps=1"]
    folder = tmp_path / "run"
    assert dispatch([*arguments, f"hydra.run.dir={folder}", "logger=json"]) == 0
    assert len(list((folder / "samples").glob("*.mp4"))) == 2


def test_the_published_settings(checkpoint: Path) -> None:
    config = compose_run(["model=wan_14b", f"model.path={checkpoint}"]).config
    requested = config.request
    assert (requested.height, requested.width, requested.frames, requested.steps, requested.guidance) == (
        480,
        832,
        81,
        50,
        5.0,
    )
    assert hashlib.sha256(str(requested.negative_prompt).encode()).hexdigest()[:16] == PUBLISHED_NEGATIVE
    assert to_dict(config)["scheduler"]["family"] == "published"
    own = ["scheduler=rectified_flow", "scheduler/solver=unipc", "scheduler.shift=5"]
    assert compose_run(["model=wan_14b", f"model.path={checkpoint}", *own]).config.scheduler.shift == 5.0
    assert compose_run(["model=wan_14b", f"model.path={checkpoint}", *own[:2]]).config.scheduler.shift == 3.0
