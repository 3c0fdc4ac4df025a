"""`comparison.json`: what two measurement sessions, run in alternation, say about each other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from harness.metrics.difference import Difference
from harness.metrics.paired import Ratio, ratio
from harness.records.record import BETWEEN_STAGES, Repeat, RunFolderError

FILE = "comparison.json"
SCHEMA = 1


class Comparison(msgspec.Struct, frozen=True):
    """Candidate B against baseline A, two lists of overrides on top of common ones.

    Attributes:
        schema: Version of the file's format.
        common: Overrides that both have.
        a: Overrides of the baseline.
        b: Overrides of the candidate.
        ranks: Ranks of A and of B.
        ratios: Time of A over time of B, by what was timed, the headline first. For generation: the whole request, one
            solver step (the median of a request, without its first), every stage that takes time, and what is between
            stages. For loads: an answer (one over the
            throughput) and percentiles of the latency.
        efficiency: Speed-ups divided by the growth of ranks; None if B has no more ranks than A.
        output: Difference of B's pixels from A's; None if they do not correspond.
        verdicts: What the fidelity of A and of B means, if it was measured; `broken` fails the comparison.
        notes: Notes for the reader.
        fingerprint: Fingerprint of the common configuration.
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
    verdicts: dict[str, str] = {}

    @property
    def headline(self) -> Ratio:
        """The most telling ratio: of the whole request, or of an answer."""
        return next(iter(self.ratios.values()))


def time_ratios(a: Sequence[Repeat], b: Sequence[Repeat]) -> dict[str, Ratio]:
    """Return the time ratios of A over B by name.

    Args:
        a: Repeats of the baseline.
        b: Repeats of the candidate, in the same rounds.

    Returns:
        One ratio for each name that both have.

    Raises:
        ValueError: There are too few rounds.
    """
    times_a, times_b = times_by_name(a), times_by_name(b)
    return {name: ratio(times_a[name], times_b[name]) for name in times_a if name in times_b}


def times_by_name(repeats: Sequence[Repeat]) -> dict[str, list[float]]:
    """Return the times in ms by name, one per repeat."""
    times = {
        "request": [repeat.total_duration_ms for repeat in repeats],
        "step": [statistics.median(repeat.later_steps_ms) for repeat in repeats],
    }
    for number, stage in enumerate(repeats[0].steps):
        times[stage.name] = [repeat.steps[number].duration_ms for repeat in repeats]
    times[BETWEEN_STAGES] = [repeat.between_stages_ms for repeat in repeats]
    return {name: values for name, values in times.items() if min(values) > 0}


def read_comparison(folder: Path) -> Comparison | None:
    """Read the comparison in a run's folder.

    Args:
        folder: The run's folder.

    Returns:
        The comparison, or None if there is none.

    Raises:
        RunFolderError: The file cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Comparison)
    except msgspec.MsgspecError as error:
        raise RunFolderError(f"{path}: not a comparison of schema {SCHEMA} ({error})") from error
