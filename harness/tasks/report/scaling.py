"""Speed-up from more ranks: runs that differ only in their parallel layout, against the one-rank run among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from harness.metrics.intervals import IntervalEstimate
from harness.metrics.unpaired import ratio_of_medians
from harness.records.record import Record, fingerprint


class Scaling(msgspec.Struct, frozen=True):
    """One run against its one-rank run.

    The two runs were not measured in alternation, so drift of the machine between them is in the ratio. task=compare
    avoids that.

    Attributes:
        base: Index of the one-rank run in the tree's order.
        ranks: Number of ranks.
        speedup: Ratio of median latencies, with a 95 % bootstrap interval from 4 repeats on.
        efficiency: Speed-up over the number of ranks.
    """

    base: int
    ranks: int
    speedup: IntervalEstimate
    efficiency: float


def scalings(folders: Sequence[Path], records: Mapping[int, Record]) -> dict[int, Scaling]:
    """Find the speed-up of every run on several ranks that has a matching one-rank run.

    The one-rank run has otherwise the same configuration, and ran on the same machine.

    Args:
        folders: Folders of all runs; of several one-rank runs, one in the same parent folder is preferred.
        records: Records by the run's index in `folders`.

    Returns:
        The speed-ups by the run's index in `folders`.
    """
    if all(record.provenance.world_size == 1 for record in records.values()):
        return {}
    groups: defaultdict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(list)
    for index, record in records.items():
        groups[fingerprint({**record.config, "parallel": None}), record.provenance.machine].append(index)
    found = {}
    for group in groups.values():
        bases = [index for index in group if records[index].provenance.world_size == 1]
        for index in group:
            ranks = records[index].provenance.world_size
            if ranks > 1 and bases:
                base = min(bases, key=lambda other: (folders[other].parent != folders[index].parent, other))
                speedup = ratio_of_medians(_latencies(records[base]), _latencies(records[index]))
                found[index] = Scaling(base, ranks, speedup, speedup.value / ranks)
    return found


def _latencies(record: Record) -> list[float]:
    return [repeat.total_duration_ms for repeat in record.repeats]
