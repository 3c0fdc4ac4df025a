"""Requests under load to a row: what became of each, latency percentiles, throughput and goodput.

Latency counts from the moment that a request was meant to be sent, not from when it was: a client that is held up by
slow answers would otherwise leave out the very requests that had to wait ("coordinated omission", Tene 2013).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

OK = "ok"
LOST = "lost"  # never answered


class RequestRow(msgspec.Struct):
    """One request, a line of `requests.jsonl`. Times are seconds since counting began: when it was to be sent, was
    sent, left the queue (null where the transport does not tell) and was answered. `outcome` is ok, a Failure's kind,
    or lost; `message` is the Failure's.
    """

    request_id: str
    due_s: float
    sent_s: float
    steps: int
    height: int
    width: int
    images: int
    began_s: float | None = None
    ended_s: float | None = None
    outcome: str = LOST
    message: str = ""

    @property
    def latency_ms(self) -> float:
        """From when it was to be sent to its answer; infinite where there is none."""
        return float("inf") if self.ended_s is None else 1e3 * (self.ended_s - self.due_s)


class Percentiles(msgspec.Struct, frozen=True):
    """Of n measurements, ms, by linear interpolation between order statistics; with n below 100 the p99 is nearly the
    largest.
    """

    n: int
    p50: float
    p90: float
    p99: float
    mean: float


class MemoryGrowth(msgspec.Struct, frozen=True):
    """Resident memory of a server's own process while it was loaded, MiB, read `n` times; the slope is a least-squares
    line's.
    """

    n: int
    start_mib: float
    end_mib: float
    slope_mib_per_min: float


class Chaos(msgspec.Struct, frozen=True):
    """What was done to a server while it was loaded: ranks that were killed; processes of it that lived on after its
    end.
    """

    kills: int
    leaked: int


class LoadSummary(msgspec.Struct, frozen=True):
    """What clients measured in `elapsed_s`, the time from the first second of sending to the last answer and at least
    `duration_s`.

    `offered_per_s` are Poisson arrivals; null in a closed loop, of `clients` clients. `outcomes` counts the `sent`
    requests by what became of them; `strays` are answers to no outstanding request, such as a second one. Latency is of
    requests that went well; `queue_ms` until a request left the queue, of those that did; `late_ms` is by how much the
    client itself sent late. `throughput_per_s` counts requests that went well, `goodput_per_s` those of them within
    `slo_ms`. `evaluations` are forwards of the denoiser on rank 0, and `images_per_evaluation` solver steps of
    pictures over them: how many pictures a forward carried, where a step is one evaluation.
    """

    transport: str
    offered_per_s: float | None
    clients: int | None
    duration_s: float
    elapsed_s: float
    sent: int
    outcomes: dict[str, int]
    strays: int
    latency_ms: Percentiles | None
    queue_ms: Percentiles | None
    late_ms: Percentiles | None
    throughput_per_s: float
    slo_ms: float | None = None
    goodput_per_s: float | None = None
    evaluations: int | None = None
    images_per_evaluation: float | None = None
    memory: MemoryGrowth | None = None
    chaos: Chaos | None = None


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """The percentiles of some values, ms; None of none."""
    if not len(values):
        return None
    p50, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99])
    return Percentiles(len(values), float(p50), float(p90), float(p99), float(np.mean(values)))


def summarize_load(
    rows: Sequence[RequestRow],
    transport: str,
    rate: float | None,
    clients: int,
    duration_s: float,
    slo_ms: float | None = None,
    strays: int = 0,
    evaluations: int | None = None,
) -> LoadSummary:
    """The row of one load.

    Args:
        rows: every request that was sent.
        transport: how.
        rate: of arrivals, per second; None in a closed loop.
        clients: of the closed loop.
        duration_s: of sending.
        slo_ms: within which an answer is good.
        strays: answers to no outstanding request.
        evaluations: forwards meanwhile, where the engine tells.
    """
    good = [row for row in rows if row.outcome == OK]
    elapsed_s = max([duration_s, *(row.ended_s for row in rows if row.ended_s is not None)])
    within = None if slo_ms is None else sum(row.latency_ms <= slo_ms for row in good)
    carried = sum(row.steps * row.images for row in good)
    return LoadSummary(
        transport=transport,
        offered_per_s=rate,
        clients=clients if rate is None else None,
        duration_s=duration_s,
        elapsed_s=elapsed_s,
        sent=len(rows),
        outcomes=dict(Counter(row.outcome for row in rows)),
        strays=strays,
        latency_ms=percentiles([row.latency_ms for row in good]),
        queue_ms=percentiles([1e3 * (row.began_s - row.due_s) for row in rows if row.began_s is not None]),
        late_ms=percentiles([1e3 * (row.sent_s - row.due_s) for row in rows]),
        throughput_per_s=len(good) / elapsed_s,
        slo_ms=slo_ms,
        goodput_per_s=None if within is None else within / elapsed_s,
        evaluations=evaluations,
        images_per_evaluation=carried / evaluations if evaluations else None,
    )
