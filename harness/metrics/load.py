"""Statistics of requests under load: outcomes, latency percentiles, throughput and goodput.

Latency counts from the time at which a request should have been sent, not from when it was. A client that is delayed by
slow answers would otherwise leave out exactly the requests that had to wait ("coordinated omission", Tene 2013).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

OK = "ok"
LOST = "lost"  # no answer came
INVALID = "invalid"  # the answer was not the images that were requested


class RequestRow(msgspec.Struct):
    """One request, a line of `requests.jsonl`; times are seconds since counting began.

    Attributes:
        request_id: Id of the request.
        due_s: Time at which it should have been sent.
        sent_s: Time at which it was sent.
        steps: Solver steps; None if the server chose, as for the next two.
        height: Height in pixels.
        width: Width in pixels.
        images: Number of images.
        began_s: Time at which it left the queue; None if the transport does not say.
        ended_s: Time of its answer; None if there was none.
        outcome: `ok`, the kind of the Failure, `invalid` for images that were not requested so, or `lost`.
        message: Message of the Failure.
        neighbours: Busy processes that were beside the ranks.
        size: Size of the decoded images, such as `512x768`, width first; empty if they were not decoded.
    """

    request_id: str
    due_s: float
    sent_s: float
    steps: int | None
    height: int | None
    width: int | None
    images: int
    began_s: float | None = None
    ended_s: float | None = None
    outcome: str = LOST
    message: str = ""
    neighbours: int = 0
    size: str = ""

    @property
    def latency_ms(self) -> float:
        """Time from when it should have been sent to its answer, ms; infinite if there is none."""
        return float("inf") if self.ended_s is None else 1e3 * (self.ended_s - self.due_s)


class Percentiles(msgspec.Struct, frozen=True):
    """Percentiles of n measurements in ms, by linear interpolation between order statistics.

    With n below 100 the p99 is nearly the largest value.
    """

    n: int
    p50: float
    p90: float
    p99: float
    mean: float


class MemoryGrowth(msgspec.Struct, frozen=True):
    """Resident memory of a server's own process under load, MiB, sampled `n` times.

    Slopes are those of least-squares lines: over all samples, and over the last two thirds of the time.
    """

    n: int
    start_mib: float
    end_mib: float
    slope_mib_per_min: float
    late_slope_mib_per_min: float | None = None


class RankKill(msgspec.Struct, frozen=True):
    """One rank that was killed on purpose.

    Attributes:
        rank: Number of the rank.
        pid: Id of its process.
        at_s: Time since the server was ready, s.
    """

    rank: int
    pid: int
    at_s: float


class Chaos(msgspec.Struct, frozen=True):
    """Faults that were injected into a loaded server, and their effect.

    `kills` counts killed ranks, `leaked` the processes of the server that outlived it. `killed` lists the killed ranks.
    """

    kills: int
    leaked: int
    killed: list[RankKill] = []


class NeighbourLatency(msgspec.Struct, frozen=True):
    """Latency beside some busy processes.

    Attributes:
        neighbours: Number of busy processes.
        latency_ms: Latency of successful requests, ms.
        slowdown: Their median over the median beside the fewest busy processes.
    """

    neighbours: int
    latency_ms: Percentiles
    slowdown: float


class ServerRow(msgspec.Struct, frozen=True):
    """A server that was not started by the run, and what was said to it.

    Attributes:
        url: Root of the server.
        dialect: API in which requests were written.
        models: What its /v1/models answered; empty if it has no such route.
        owner: `owned_by` of the first of them; empty if it is not said.
        model: Model that requests named; None if they named none.
        fields: Fields of every request, at the top and in the object `triptych`.
    """

    url: str
    dialect: str
    models: list[str]
    owner: str
    model: str | None
    fields: list[str]


class Minimums(msgspec.Struct, frozen=True):
    """What a run must reach to count, as by the rules of a scenario.

    Attributes:
        duration_s: Shortest time, s.
        queries: Fewest answered requests.
        met: Whether the run reached both.
    """

    duration_s: float
    queries: int
    met: bool


class LoadSummary(msgspec.Struct, frozen=True):
    """What clients measured.

    Attributes:
        transport: How requests reached the engine: zmq or http.
        offered_per_s: Mean rate of arrivals, per second; None in a closed loop, or if all were sent at once.
        clients: Clients of the closed loop; None for other arrivals.
        duration_s: Time of sending, s.
        elapsed_s: Time from the start of sending to the last answer, at least `duration_s`, s.
        sent: Number of requests sent.
        outcomes: Number of requests by outcome.
        strays: Answers to no outstanding request, such as a second answer.
        latency_ms: Latency of successful requests, ms.
        queue_ms: Time in the queue of the requests that left it, ms.
        late_ms: Delay by which the client itself sent late, ms.
        throughput_per_s: Successful requests per second.
        longest_gap_s: Longest time of sending without a successful answer, s.
        slo_ms: Latency objective, ms.
        goodput_per_s: Successful requests within `slo_ms` per second.
        evaluations: Forwards of the denoiser on rank 0.
        images_per_evaluation: Solver steps of images per forward: how many images a forward carried, if a step is one
            evaluation.
        memory: Growth of the server's memory.
        chaos: Injected faults.
        neighbours: Latency by the number of busy processes beside the ranks; empty if there were none.
        arrivals: Kind of the arrivals: closed loop, Poisson, gamma, trace or at once; ramps are in the configuration.
        scenario: Scenario of MLPerf; None without one.
        minimums: What the run had to reach; None if nothing.
        slo_met: Whether load.slo_percentile of the requests were within `slo_ms`; None if that is not given.
        sizes: Number of answers by the size of their decoded images; empty if they were not decoded.
        invalid: Message of the first answer that was not the images that were requested; empty if there was none.
        server: The server, if the run did not start it.
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
    neighbours: list[NeighbourLatency] = []
    longest_gap_s: float | None = None
    arrivals: str = ""
    scenario: str | None = None
    minimums: Minimums | None = None
    slo_met: bool | None = None
    sizes: dict[str, int] = {}
    invalid: str = ""
    server: ServerRow | None = None


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """Return the percentiles of some values in ms, or None for no values."""
    if not len(values):
        return None
    p50, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99])
    return Percentiles(len(values), float(p50), float(p90), float(p99), float(np.mean(values)))


def summarize_load(
    rows: Sequence[RequestRow],
    transport: str,
    rate: float | None,
    clients: int | None,
    duration_s: float,
    slo_ms: float | None = None,
    strays: int = 0,
    evaluations: int | None = None,
) -> LoadSummary:
    """Summarize one load.

    Args:
        rows: Every request that was sent.
        transport: How requests reached the engine: zmq or http.
        rate: Rate of arrivals per second; None in a closed loop.
        clients: Clients of the closed loop; None if there is none.
        duration_s: Time of sending, s.
        slo_ms: Latency objective, ms.
        strays: Answers to no outstanding request.
        evaluations: Forwards of the denoiser in that time, if the engine reports them.

    Returns:
        The summary.
    """
    good = [row for row in rows if row.outcome == OK]
    elapsed_s = max([duration_s, *(row.ended_s for row in rows if row.ended_s is not None)])
    within = None if slo_ms is None else sum(row.latency_ms <= slo_ms for row in good)
    carried = sum((row.steps or 0) * row.images for row in good)
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
        images_per_evaluation=carried / evaluations if evaluations and all(row.steps for row in good) else None,
        neighbours=latency_by_neighbours(good),
        longest_gap_s=longest_gap_s([row.ended_s for row in good if row.ended_s is not None], duration_s),
        sizes=dict(Counter(row.size for row in good if row.size)),
        invalid=next((row.message for row in rows if row.outcome == INVALID), ""),
    )


def longest_gap_s(answers_s: Sequence[float], duration_s: float) -> float:
    """Return the longest time without an answer, from the start of sending to its end, s.

    Args:
        answers_s: The times of the answers, s.
        duration_s: The time of sending, s.
    """
    times = np.sort([0.0, *(at_s for at_s in answers_s if at_s < duration_s), duration_s])
    return float(np.diff(times).max())


def latency_by_neighbours(good: Sequence[RequestRow]) -> list[NeighbourLatency]:
    """Return the latency by the number of busy processes, the fewest first; empty for one number only.

    Args:
        good: The successful requests.
    """
    groups: dict[int, list[float]] = {}
    for row in good:
        groups.setdefault(row.neighbours, []).append(row.latency_ms)
    found = [(count, latency) for count in sorted(groups) if (latency := percentiles(groups[count])) is not None]
    if len(found) < 2:
        return []
    return [NeighbourLatency(count, latency, latency.p50 / found[0][1].p50) for count, latency in found]


def is_within_slo(rows: Sequence[RequestRow], slo_ms: float, percentile: float) -> bool:
    """Return whether enough of all requests succeeded within the objective; one that failed was not within it.

    Args:
        rows: Every request that was sent.
        slo_ms: Latency objective, ms.
        percentile: Percentage of the requests.
    """
    within = sum(row.outcome == OK and row.latency_ms <= slo_ms for row in rows)
    return bool(rows) and 100 * within >= percentile * len(rows)
