"""`images.jsonl`: one line for every image of a data set, written as soon as the image is on disk.

The statistics of a streamed run come from these lines, so that nothing is kept in memory while it runs. A command that
was cut off goes on after them, and the lines of several shards are read as those of one run.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from harness.messages import CollectiveTraffic
from harness.metrics.intervals import RESAMPLES, IntervalEstimate, Share, interval, wilson
from harness.metrics.summary import Summary, summarize
from harness.records.record import CacheUse, CategoryRow, RunFolderError, Statistics

FILE = "images.jsonl"
GRID_IMAGES = 64


class RequestTimes(msgspec.Struct, frozen=True, omit_defaults=True):
    """The times and the work of one request of a stream.

    Attributes:
        total_duration_ms: Time of the request, ms.
        stage_ms: Time of each stage of the slowest rank, ms.
        step_ms: Median of its solver steps after the first, ms.
        overhead_share: Share outside the networks' forwards.
        nfe: Evaluations of the denoiser for one image.
        peak_memory_mib: Peak memory by rank, MiB.
        first_step_ms: Time of its first solver step, ms; None if there is no other.
        energy_j: Energy, J; None if it is not reported.
    """

    total_duration_ms: float
    stage_ms: dict[str, float]
    step_ms: float
    overhead_share: float
    nfe: int
    peak_memory_mib: list[float]
    first_step_ms: float | None = None
    energy_j: float | None = None


class ImageRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line: an image that is on disk.

    Attributes:
        index: Number of the image in the whole data set, from 0.
        id: Name of the prompt in its file.
        categories: Categories of the prompt.
        prompt: The prompt.
        negative_prompt: The negative prompt.
        seed: Seed of the image.
        height: Height in pixels.
        width: Width in pixels.
        path: File of the image, relative to the run's folder.
        sha256: Hash of its 8-bit pixels.
        duration_ms: Time of its request divided by the request's images, ms.
        request: Times of its request; None in all lines of a request but the first.
        clip_score: CLIP score; None if it was not scored.
        top1: Whether the nearest image of the gallery has the prompt's name; None if it was not scored.
        distance: Distance to the requested image of the gallery; None if it was not scored.
    """

    index: int
    id: str
    categories: tuple[str, ...]
    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int
    path: str
    sha256: str
    duration_ms: float
    request: RequestTimes | None = None
    clip_score: float | None = None
    top1: bool | None = None
    distance: float | None = None


def read_images(folder: Path) -> Iterator[ImageRow]:
    """Yield the lines of a run's folder; a last line that was cut off is left out.

    Args:
        folder: The run's folder.

    Yields:
        One row per image.

    Raises:
        RunFolderError: A line is not one of this file's.
    """
    decoder = msgspec.json.Decoder(ImageRow)
    with (folder / FILE).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield decoder.decode(line)
            except msgspec.MsgspecError as error:
                raise RunFolderError(f"{folder / FILE}: line {number} is no image of a run ({error})") from error


def rewrite_images(folder: Path, rows: Iterable[ImageRow]) -> None:
    """Write all lines of a run's folder again; a reader sees the old ones or the new ones.

    Args:
        folder: The run's folder.
        rows: The rows.
    """
    temporary = folder / f".{FILE}.part"
    with open(temporary, "wb", opener=_open_private) as file:
        for row in rows:
            file.write(msgspec.json.encode(row) + b"\n")
    temporary.replace(folder / FILE)


class ImageLog:
    """The file while a run writes it; each line is on disk before the next image is generated.

    Opening it drops the lines whose image is gone, and a last line that was cut off.

    Args:
        folder: The run's folder.

    Attributes:
        done: Numbers of the images that the file has.
    """

    def __init__(self, folder: Path) -> None:
        self.done: set[int] = set()
        self._path = folder / FILE
        if self._path.exists():
            self._keep_existing(folder)
        descriptor = os.open(self._path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        self._file: IO[bytes] = os.fdopen(descriptor, "ab", buffering=0)

    def _keep_existing(self, folder: Path) -> None:
        rewrite_images(folder, self._still_there(folder))

    def _still_there(self, folder: Path) -> Iterator[ImageRow]:
        for row in read_images(folder):
            if row.index not in self.done and (folder / row.path).is_file():
                self.done.add(row.index)
                yield row

    def append(self, row: ImageRow) -> None:
        """Add the line of an image that is on disk."""
        self._file.write(msgspec.json.encode(row) + b"\n")
        self.done.add(row.index)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> ImageLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def grid_rows(rows: Iterable[ImageRow], count: int, most: int = GRID_IMAGES) -> list[ImageRow]:
    """Return the images of the grid: at most 64, evenly over all.

    Args:
        rows: The images.
        count: Number of images.
        most: Largest number of images in the grid.

    Returns:
        The rows of the grid.
    """
    chosen = {k * count // min(count, most) for k in range(min(count, most))}
    return [row for number, row in enumerate(rows) if number in chosen]


def image_statistics(
    rows: Iterable[ImageRow],
    comm: dict[str, dict[str, CollectiveTraffic]] | None = None,
    cache: CacheUse | None = None,
) -> tuple[Statistics, list[CategoryRow]]:
    """Return the statistics of a stream over its requests, and one row per category over its images.

    Args:
        rows: The images, at least one.
        comm: Traffic of the last request.
        cache: What a cache saved in the last request.

    Returns:
        The statistics and the categories in alphabetical order; none if no prompt has one.
    """
    requests: list[RequestTimes] = []
    images = 0
    by_category: dict[str, _CategoryValues] = defaultdict(_CategoryValues)
    for row in rows:
        images += 1
        if row.request is not None:
            requests.append(row.request)
        for name in row.categories:
            by_category[name].add(row)
    return _statistics(requests, images, comm or {}, cache), [
        values.row(name) for name, values in sorted(by_category.items())
    ]


def _statistics(
    requests: Sequence[RequestTimes],
    images: int,
    comm: dict[str, dict[str, CollectiveTraffic]],
    cache: CacheUse | None,
) -> Statistics:
    stages = dict.fromkeys(name for request in requests for name in request.stage_ms)
    ranks = max(len(request.peak_memory_mib) for request in requests)
    of_all = [request.peak_memory_mib for request in requests if len(request.peak_memory_mib) == ranks]
    peaks = [max(peak) for peak in zip(*of_all, strict=True)]
    first = [request.first_step_ms for request in requests if request.first_step_ms is not None]
    energies = [request.energy_j for request in requests if request.energy_j is not None]
    total_ms = sum(request.total_duration_ms for request in requests)
    return Statistics(
        latency_ms=summarize([request.total_duration_ms for request in requests]),
        step_ms=summarize([request.step_ms for request in requests]),
        stage_ms={
            name: summarize([request.stage_ms[name] for request in requests if name in request.stage_ms])
            for name in stages
        },
        overhead_share=summarize([request.overhead_share for request in requests]),
        throughput_per_s=1e3 * images / total_ms,
        nfe=round(np.mean([request.nfe for request in requests])),
        peak_memory_mib=peaks,
        peak_memory_mib_max=max(peaks),
        comm=comm,
        cache=cache,
        energy_j=summarize(energies) if len(energies) == len(requests) else None,
        first_step_ms=summarize(first) if first else None,
    )


class _CategoryValues:
    """The numbers of one category's images."""

    def __init__(self) -> None:
        self.durations: list[float] = []
        self.clip: list[float] = []
        self.hits: list[bool] = []
        self.distances: list[float] = []

    def add(self, row: ImageRow) -> None:
        """Add the numbers of an image."""
        self.durations.append(row.duration_ms)
        if row.clip_score is not None:
            self.clip.append(row.clip_score)
        if row.top1 is not None:
            self.hits.append(row.top1)
        if row.distance is not None:
            self.distances.append(row.distance)

    def row(self, name: str) -> CategoryRow:
        """Return the row of the category."""
        duration: Summary = summarize(self.durations)
        top1: Share | None = wilson(sum(self.hits), len(self.hits)) if self.hits else None
        clip = mean_estimate(self.clip) if self.clip else None
        distance = mean_estimate(self.distances) if self.distances else None
        return CategoryRow(name, len(self.durations), duration, top1, distance, clip)


def mean_estimate(values: Sequence[float]) -> IntervalEstimate:
    """Return the mean of independent values, at least one, with a bootstrap interval."""
    return bootstrap_estimate(values, np.mean)


def bootstrap_estimate(values: Sequence[float], statistic: Callable[[NDArray[Any]], Any]) -> IntervalEstimate:
    """Return a statistic of independent values, with a bootstrap interval.

    Args:
        values: The values, at least one.
        statistic: Function of an array of values, such as np.median.

    Returns:
        The statistic and its interval.
    """
    x, random = np.asarray(values, dtype=float), np.random.default_rng(0)
    # one sample in memory at a time
    found = [float(statistic(x[random.integers(0, len(x), len(x))])) for _ in range(RESAMPLES)]
    return IntervalEstimate(float(statistic(x)), interval(np.array(found), len(x)), len(x))
