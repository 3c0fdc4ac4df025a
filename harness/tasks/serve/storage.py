"""What a server leaves in its folder: the pictures, and a line for each request in requests.jsonl."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from harness.messages import Array, GenerationRequest, SampleResult
from harness.records.media import pixel_hash, save_mp4, save_png, to_uint8
from harness.records.record import SampleRow

REQUESTS_FILE = "requests.jsonl"


class RequestRow(msgspec.Struct, frozen=True):
    """A line of requests.jsonl. `outcome` is ok or the code of an error; times in seconds since 1970; `total_ms` is
    the engine's own, from its start on the request to the last rank's end.
    """

    request: GenerationRequest
    outcome: str
    arrived: float
    began: float | None
    ended: float | None
    total_ms: float | None = None
    user: str | None = None
    error: str | None = None
    samples: list[SampleRow] = []


def save(
    folder: Path,
    request: GenerationRequest,
    samples: Sequence[SampleResult],
    pixels: Sequence[Array],
    fps: int,
    fingerprint: str,
) -> list[SampleRow]:
    """Writes the pictures of one request to `samples/`; the rows that name them.

    Args:
        folder: of the run.
        request: which was drawn.
        samples: of the answer.
        pixels: of each, (3, height, width) or (frames, 3, height, width), float32 in [0, 1].
        fps: of videos.
        fingerprint: of the server's configuration.

    Raises:
        OSError: the disk is full, or the folder is gone; as after any error, no part of the request's pictures is left.
    """
    (folder / "samples").mkdir(exist_ok=True)
    rows: list[SampleRow] = []
    try:
        for sample, picture in zip(samples, (to_uint8(p) for p in pixels), strict=True):
            suffix = "png" if picture.ndim == 3 else "mp4"
            name = f"samples/{request.request_id}-{sample.index:02d}.{suffix}"
            rows.append(SampleRow(name, sample.prompt, sample.seed, pixel_hash(picture)))
            text = {"prompt": sample.prompt, "seed": str(sample.seed), "fingerprint": fingerprint}
            if suffix == "png":
                save_png(folder / name, picture, text)
            else:
                save_mp4(folder / name, picture, fps, text)
    except Exception:
        remove(folder, rows)
        raise
    return rows


def remove(folder: Path, rows: Sequence[SampleRow]) -> None:
    """Removes pictures, as far as they are there."""
    for row in rows:
        with suppress(OSError):
            (folder / row.path).unlink()


def append(folder: Path, row: RequestRow) -> None:
    """Adds a line in one write, so that lines of different threads never mix.

    Raises:
        OSError: the disk is full, or the folder is gone.
    """
    descriptor = os.open(folder / REQUESTS_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, msgspec.json.encode(row) + b"\n")
    finally:
        os.close(descriptor)
