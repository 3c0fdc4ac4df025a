"""Caches against equal-latency baselines: the runs without a cache, in fewer steps, that take no longer.

A run of n steps without a cache needs as many evaluations fewer as it has steps fewer. Both runs are compared with one
reference, that of the full number of steps (task.reference_steps), so their errors compare.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from harness.config.cache import NONE
from harness.records.record import Record, fingerprint

Winner = Literal["cache", "fewer steps"]


class EqualLatencyBaseline(msgspec.Struct, frozen=True):
    """The equal-latency baseline of a cached run: the slowest run without a cache that takes no longer.

    Attributes:
        run: Index of the baseline in the tree's order.
        error_at_equal_latency: Error at the cached run's latency, interpolated linearly between the baseline and the
            next slower run; None if there is no slower run.
        better: The winner by smaller error; the cached run competes with `error_at_equal_latency`, or with the
            baseline's error if that is None.
    """

    run: int
    error_at_equal_latency: float | None
    better: Winner


class LatencyPoint(NamedTuple):
    """One run as a point of error against latency.

    Attributes:
        latency_ms: Median latency, ms.
        error: Relative L2 error of the pixels.
        run: Index of the run in the tree's order.
    """

    latency_ms: float
    error: float
    run: int


def equal_latency_baselines(records: Mapping[int, Record]) -> dict[int, EqualLatencyBaseline]:
    """Find the equal-latency baseline of every cached run that has one.

    A baseline has the same reference as the cached run, and differs from it in nothing but the cache and the steps.

    Args:
        records: Records by the run's index in the tree's order.

    Returns:
        The baselines by the index of the cached run.
    """
    if not any(record.summary is not None and record.summary.cache for record in records.values()):
        return {}
    plain: defaultdict[tuple[str, ...], list[LatencyPoint]] = defaultdict(list)
    cached: list[tuple[tuple[str, ...], LatencyPoint]] = []
    for index, record in records.items():
        if record.summary is None or record.fidelity is None:
            continue
        point = LatencyPoint(record.summary.latency_ms.median, record.fidelity.pixel.rel_l2, index)
        if record.summary.cache is not None:
            cached.append((_comparison_key(record), point))
        elif cache_name(record) == NONE:
            plain[_comparison_key(record)].append(point)
    found = {point.run: equal_latency_baseline(point, sorted(plain[group])) for group, point in cached}
    return {index: each for index, each in found.items() if each is not None}


def equal_latency_baseline(cached: LatencyPoint, plain: Sequence[LatencyPoint]) -> EqualLatencyBaseline | None:
    """Find the equal-latency baseline of one cached run.

    Args:
        cached: The cached run.
        plain: Comparable runs without a cache, by rising latency.

    Returns:
        The baseline, or None if all runs without a cache are slower.
    """
    count = bisect_right([point.latency_ms for point in plain], cached.latency_ms)
    if count == 0:
        return None
    nearest = plain[count - 1]
    interpolated = None
    if count < len(plain):
        line = plain[count - 1 : count + 1]
        interpolated = float(np.interp(cached.latency_ms, [p.latency_ms for p in line], [p.error for p in line]))
    other = nearest.error if interpolated is None else interpolated
    return EqualLatencyBaseline(nearest.run, interpolated, "cache" if cached.error < other else "fewer steps")


def cache_name(record: Record) -> str:
    """Return the name of a run's cache; records written before caches existed have none."""
    found: str = record.config.get("cache", {}).get("name", NONE)
    return found


def _comparison_key(record: Record) -> tuple[str, ...]:
    """Return what comparable runs share: reference, machine, threads, and the configuration except cache and steps."""
    request = {**record.config["request"], "steps": None}
    rest = {**record.config, "cache": None, "request": request, "task": {"name": "bench"}}
    origin = record.provenance
    reference = "" if record.fidelity is None else record.fidelity.reference
    return reference, *origin.machine, str(origin.threads_per_rank), fingerprint(rest)
