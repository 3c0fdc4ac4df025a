"""`comparison.json`: what two series of repeats, drawn in alternation, say of one another."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from harness.metrics.difference import Difference
from harness.metrics.paired import Ratio, ratio
from harness.records.record import Repeat, RunFolderError

FILE = "comparison.json"
SCHEMA = 1


class Comparison(msgspec.Struct, frozen=True):
    """B against A, two lists of overrides on top of what both have in common.

    `ratios` are by what was timed, the headline first: the whole request, one solver step (a request's median) and
    every stage that takes time; or of loads an answer (one over the throughput) and percentiles of the latency.
    `efficiency` is each speed-up over the growth of ranks, null where B has no more ranks than A. `output` is how
    far B's pixels are from A's, null where they do not correspond. `fingerprint` is of the common configuration.
    """

    schema: int
    common: list[str]
    a: list[str]
    b: list[str]
    ranks: tuple[int, int]
    ratios: dict[str, Ratio]
    efficiency: dict[str, float] | None
    output: Difference | None
    notes: list[str] = []
    fingerprint: str = ""

    @property
    def headline(self) -> Ratio:
        """The ratio that tells most: of the whole request, or of an answer."""
        return next(iter(self.ratios.values()))


def time_ratios(a: Sequence[Repeat], b: Sequence[Repeat]) -> dict[str, Ratio]:
    """A over B by name.

    Raises:
        ValueError: too few rounds.
    """
    times_a, times_b = times_by_name(a), times_by_name(b)
    return {name: ratio(times_a[name], times_b[name]) for name in times_a if name in times_b}


def times_by_name(repeats: Sequence[Repeat]) -> dict[str, list[float]]:
    """Times by name, ms, one a repeat."""
    times = {
        "request": [repeat.total_duration_ms for repeat in repeats],
        "step": [statistics.median(step.duration_ms for step in repeat.denoise_steps_ms) for repeat in repeats],
    }
    for number, stage in enumerate(repeats[0].steps):
        times[stage.name] = [repeat.steps[number].duration_ms for repeat in repeats]
    return {name: values for name, values in times.items() if min(values) > 0}


def read_comparison(folder: Path) -> Comparison | None:
    """The comparison in a run's folder, None where there is none.

    Raises:
        RunFolderError: one that cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Comparison)
    except msgspec.MsgspecError as error:
        raise RunFolderError(f"{path}: not a comparison of schema {SCHEMA} ({error})") from error
