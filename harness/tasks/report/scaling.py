"""What more ranks are worth: runs that differ in their parallel layout only, against the one-rank run among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from harness.metrics.intervals import IntervalEstimate, interval
from harness.metrics.summary import RESAMPLES
from harness.records.record import Record, fingerprint


class Scaling(msgspec.Struct, frozen=True):
    """One run against its one-rank run `base`, both by their place in the tree's order.

    `speedup` is the ratio of median latencies with a 95 % bootstrap interval; `efficiency` is it over the ranks. The
    two were not drawn in alternation, so drift of the machine between them is in the ratio; task=compare has it out.
    """

    base: int
    ranks: int
    speedup: IntervalEstimate
    efficiency: float


def scalings(folders: Sequence[Path], records: Mapping[int, Record]) -> dict[int, Scaling]:
    """Of every run of more than one rank that has a one-rank run of the same everything else, on the same machine.

    Args:
        folders: of all runs; among several one-rank runs the one beside a run in the tree is its base.
        records: by the run's place in `folders`.
    """
    groups: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)
    for place, record in records.items():
        hardware = record.provenance.hardware
        groups[fingerprint({**record.config, "parallel": None}), hardware.cpu, hardware.device].append(place)
    found = {}
    for group in groups.values():
        bases = [place for place in group if records[place].provenance.world_size == 1]
        for place in group:
            ranks = records[place].provenance.world_size
            if ranks > 1 and bases:
                base = min(bases, key=lambda other: (folders[other].parent != folders[place].parent, other))
                speedup = ratio_of_medians(_latencies(records[base]), _latencies(records[place]))
                found[place] = Scaling(base, ranks, speedup, speedup.value / ranks)
    return found


def ratio_of_medians(a: Sequence[float], b: Sequence[float]) -> IntervalEstimate:
    """median(a) / median(b) of two independent series, with the bootstrap interval."""
    random = np.random.default_rng(0)
    medians = [np.median(random.choice(x, size=(RESAMPLES, len(x))), axis=1) for x in (np.array(a), np.array(b))]
    return IntervalEstimate(float(np.median(a) / np.median(b)), interval(medians[0] / medians[1]), min(len(a), len(b)))


def _latencies(record: Record) -> list[float]:
    return [repeat.total_duration_ms for repeat in record.repeats]
