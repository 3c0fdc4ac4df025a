"""What a server writes to its folder: the images and videos, and one line per request in requests.jsonl."""

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


class RequestLogEntry(msgspec.Struct, frozen=True):
    """One line of requests.jsonl.

    Attributes:
        request: The request as the engine received it.
        outcome: ok, or the code of the error.
        arrived: The time of arrival, seconds since 1970.
        began: The time at which the request left the queue, seconds since 1970; None if it never did.
        ended: The time of the answer, seconds since 1970.
        total_ms: The engine's own time, from its start on the request to the end of the last rank, ms.
        user: The client's name for its user.
        error: The message of the error.
        samples: The saved images or videos.
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


def save_samples(
    folder: Path,
    request: GenerationRequest,
    samples: Sequence[SampleResult],
    pixels: Sequence[Array],
    fps: int,
    fingerprint: str,
) -> list[SampleRow]:
    """Write the images or videos of one request to `samples/`. After an error, no file of the request is left.

    Args:
        folder: The run's folder.
        request: The request that was answered.
        samples: The samples of the answer.
        pixels: The pixels of each sample, (3, height, width) or (frames, 3, height, width), float32 in [0, 1].
        fps: The frame rate of videos, frames per second.
        fingerprint: The fingerprint of the server's configuration.

    Returns:
        One row per file, with its path relative to the folder.

    Raises:
        OSError: The disk is full, or the folder is gone.
    """
    (folder / "samples").mkdir(exist_ok=True)
    rows: list[SampleRow] = []
    try:
        for sample, array in zip(samples, (to_uint8(p) for p in pixels), strict=True):
            suffix = "png" if array.ndim == 3 else "mp4"
            name = f"samples/{request.request_id}-{sample.index:02d}.{suffix}"
            rows.append(SampleRow(name, sample.prompt, sample.seed, pixel_hash(array)))
            text = {"prompt": sample.prompt, "seed": str(sample.seed), "fingerprint": fingerprint}
            if suffix == "png":
                save_png(folder / name, array, text)
            else:
                save_mp4(folder / name, array, fps, text)
    except Exception:
        remove_samples(folder, rows)
        raise
    return rows


def remove_samples(folder: Path, rows: Sequence[SampleRow]) -> None:
    """Remove the files of some samples; a missing file is no error."""
    for row in rows:
        with suppress(OSError):
            (folder / row.path).unlink()


def append_entry(folder: Path, entry: RequestLogEntry) -> None:
    """Append a line to requests.jsonl in one write, so that lines of different threads never mix.

    Args:
        folder: The run's folder.
        entry: The line to write.

    Raises:
        OSError: The disk is full, or the folder is gone.
    """
    descriptor = os.open(folder / REQUESTS_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, msgspec.json.encode(entry) + b"\n")
    finally:
        os.close(descriptor)
