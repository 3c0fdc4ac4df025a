"""What a server writes to its folder: the images and videos, and one line per request in requests.jsonl."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from harness.messages import Array, GenerationRequest, SampleResult
from harness.records.media import open_private, pixel_hash, save_mp4, to_uint8
from harness.records.record import SampleRow
from harness.tasks.serve.image_files import PNG, ImageEncoding

REQUESTS_FILE = "requests.jsonl"
ROTATED_FILE = "requests.1.jsonl"
MAX_REQUESTS_BYTES = 16 << 20  # then the file becomes ROTATED_FILE, in place of the one before


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
        http_id: The id of the HTTP request, its x-request-id.
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
    http_id: str | None = None
    error: str | None = None
    samples: list[SampleRow] = []


def save_samples(
    folder: Path,
    request: GenerationRequest,
    samples: Sequence[SampleResult],
    pixels: Sequence[Array],
    fps: int,
    fingerprint: str,
    encoding: ImageEncoding = PNG,
) -> list[SampleRow]:
    """Write the images or videos of one request to `samples/`. After an error, no file of the request is left.

    Args:
        folder: The run's folder.
        request: The request that was answered.
        samples: The samples of the answer.
        pixels: The pixels of each sample, (3, height, width) or (frames, 3, height, width), float32 in [0, 1].
        fps: The frame rate of videos, frames per second.
        fingerprint: The fingerprint of the server's configuration.
        encoding: How images are written.

    Returns:
        One row per file, with its path relative to the folder.

    Raises:
        OSError: The disk is full, or the folder is gone.
    """
    (folder / "samples").mkdir(mode=0o700, exist_ok=True)
    rows: list[SampleRow] = []
    try:
        for sample, array in zip(samples, (to_uint8(p) for p in pixels), strict=True):
            suffix = encoding.format if array.ndim == 3 else "mp4"
            name = f"samples/{request.request_id}-{sample.index:02d}.{suffix}"
            rows.append(SampleRow(name, sample.prompt, sample.seed, pixel_hash(array)))
            text = {"prompt": sample.prompt, "seed": str(sample.seed), "fingerprint": fingerprint}
            if suffix == "mp4":
                save_mp4(folder / name, array, fps, text)
            else:
                save_image(folder / name, array, text, encoding)
    except Exception:
        remove_samples(folder, rows)
        raise
    return rows


def save_image(path: Path, image: NDArray[np.uint8], text: dict[str, str], encoding: ImageEncoding) -> None:
    """Write 8-bit pixels (H, W, 3), with `text` in the file, for its owner alone."""
    with open(path, "wb", opener=open_private) as file:
        file.write(encoding.encode(image, text))


def remove_samples(folder: Path, rows: Sequence[SampleRow]) -> None:
    """Remove the files of some samples; a missing file is no error."""
    for row in rows:
        with suppress(OSError):
            (folder / row.path).unlink()


def append_entry(folder: Path, entry: RequestLogEntry, max_bytes: int = MAX_REQUESTS_BYTES) -> None:
    """Append a line to requests.jsonl: the whole line or nothing of it, and never amid another one.

    A torn line, which a killed server leaves, is cut off first. A file that is too large is rotated.

    Args:
        folder: The run's folder.
        entry: The line to write.
        max_bytes: The size above which the file is rotated, bytes.

    Raises:
        OSError: The disk is full, or the folder is gone.
    """
    line = msgspec.json.encode(entry) + b"\n"
    descriptor = _open_locked(folder / REQUESTS_FILE)
    try:
        while (size := _whole_lines(descriptor)) and size + len(line) > max_bytes:
            (folder / REQUESTS_FILE).replace(folder / ROTATED_FILE)
            rotated, descriptor = descriptor, _open_locked(folder / REQUESTS_FILE)
            os.close(rotated)
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    """Open a file to append to it, alone among all threads; another one may have rotated it meanwhile."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)


def _whole_lines(descriptor: int) -> int:
    """Cut a torn line off the end of a file, and return the size of the rest, bytes."""
    size = end = os.fstat(descriptor).st_size
    while end:
        begin = max(0, end - (1 << 16))
        found = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        end = begin + found + 1 if found >= 0 else begin
        if found >= 0:
            break
    if end < size:
        os.ftruncate(descriptor, end)
    return end
