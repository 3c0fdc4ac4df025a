"""What a cache is worth: beside each cached run the plain runs of fewer steps that take no longer.

A plain run of n steps spares as many evaluations as it has steps fewer, and needs no cache. Both are held against one
reference, that of the full number of steps (task.reference_steps), so their errors compare.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from harness.config.cache import NONE
from harness.records.record import Record, fingerprint

Winner = Literal["cache", "fewer steps"]


class Rival(msgspec.Struct, frozen=True):
    """Of a cached run the slowest plain run that takes no longer, by its place in the tree's order; and the error of a
    plain run that takes as long, on the line between that one and the next slower one (null where there is none).

    `better` is the smaller error: of the cached run, or of that point; of the plain run itself where there is no point.
    """

    plain: int
    error_as_long: float | None
    better: Winner


class Point(NamedTuple):
    """A plain run: its median latency, its pixels' relative L2, and its place in the tree's order."""

    latency_ms: float
    error: float
    place: int


def rivals(records: Mapping[int, Record]) -> dict[int, Rival]:
    """Of every cached run that has a plain run as fast, with the same reference and the same everything else.

    Args:
        records: by the run's place in the tree's order.
    """
    plain: defaultdict[tuple[str, ...], list[Point]] = defaultdict(list)
    cached: list[tuple[tuple[str, ...], Point]] = []
    for place, record in records.items():
        if record.summary is None or record.fidelity is None:
            continue
        point = Point(record.summary.latency_ms.median, record.fidelity.pixel.rel_l2, place)
        if record.summary.cache is not None:
            cached.append((_circumstances(record), point))
        elif cache_name(record) == NONE:
            plain[_circumstances(record)].append(point)
    found = {point.place: rival(point, sorted(plain[group])) for group, point in cached}
    return {place: each for place, each in found.items() if each is not None}


def rival(cached: Point, plain: Sequence[Point]) -> Rival | None:
    """Of one cached run among plain ones in the order of their latency; None where all are slower."""
    behind = bisect_right([point.latency_ms for point in plain], cached.latency_ms)
    if behind == 0:
        return None
    nearest = plain[behind - 1]
    as_long = None
    if behind < len(plain):
        line = plain[behind - 1 : behind + 1]
        as_long = float(np.interp(cached.latency_ms, [p.latency_ms for p in line], [p.error for p in line]))
    other = nearest.error if as_long is None else as_long
    return Rival(nearest.place, as_long, "cache" if cached.error < other else "fewer steps")


def cache_name(record: Record) -> str:
    """The cache of a run; records from before there were any have none."""
    found: str = record.config.get("cache", {}).get("name", NONE)
    return found


def _circumstances(record: Record) -> tuple[str, ...]:
    """What runs that compare have in common: reference, machine, threads, and all but the cache and the steps."""
    rest = copy.deepcopy({**record.config, "cache": None})
    rest["request"]["steps"], rest["task"] = None, {"name": "bench"}
    origin = record.provenance
    reference = "" if record.fidelity is None else record.fidelity.reference
    return reference, origin.hardware.cpu, origin.hardware.device, str(origin.threads_per_rank), fingerprint(rest)
