"""What one load measured, and several of them as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from harness.config.load import LoadConfig
from harness.config.schema import RunConfig
from harness.metrics.load import OK, LoadSummary, Minimums, RequestRow, is_within_slo, summarize_load
from harness.tasks.load.arrivals import ArrivalRate


@dataclass(frozen=True)
class LoadMeasurement:
    """The measurement of one load.

    Attributes:
        summary: The summary of all requests.
        rows: Every request, in the order of sending.
    """

    summary: LoadSummary
    rows: list[RequestRow]


def summarize(
    config: RunConfig,
    rows: Sequence[RequestRow],
    strays: int,
    evaluations: int | None,
    duration_s: float | None = None,
) -> LoadSummary:
    """Summarise one load, or several rounds of it in sequence.

    Args:
        config: The resolved configuration of the load.
        rows: Every request.
        strays: The number of answers to requests that were not outstanding.
        evaluations: The number of the denoiser's forwards, if the engine reports it.
        duration_s: The time of sending, seconds; None is that of one round.

    Returns:
        The summary for the record.
    """
    load = config.load
    duration_s = sending_time(load, rows) if duration_s is None else duration_s
    arrivals = kind_of_arrivals(load)
    summary = summarize_load(
        rows,
        load.transport.name,
        offered_rate(load, rows, duration_s),
        load.clients if arrivals == "closed loop" else None,
        duration_s,
        load.slo_ms,
        strays,
        evaluations,
    )
    return msgspec.structs.replace(
        summary,
        arrivals=arrivals,
        scenario=None if load.scenario is None else load.scenario.name,
        minimums=check_minimums(load, summary),
        slo_met=None
        if load.slo_percentile is None or load.slo_ms is None
        else is_within_slo(rows, load.slo_ms, load.slo_percentile),
    )


def kind_of_arrivals(load: LoadConfig) -> str:
    """Return when a load sends, in words: `closed loop`, `Poisson`, `gamma`, `trace` or `at once`."""
    if load.trace is not None:
        return "trace"
    if load.at_once:
        return "at once"
    if load.rate is None:
        return "closed loop"
    return "Poisson" if load.burstiness == 1 else "gamma"


def sending_time(load: LoadConfig, rows: Sequence[RequestRow]) -> float:
    """Return the time of sending of one round, seconds: up to the last request if their number is given.

    Args:
        load: The configuration of the clients.
        rows: The requests of the round.
    """
    if load.trace is None and load.requests is None:
        return load.duration_s
    return max((row.due_s for row in rows), default=0.0)


def offered_rate(load: LoadConfig, rows: Sequence[RequestRow], duration_s: float) -> float | None:
    """Return the mean rate of arrivals, requests/s; None in a closed loop, or if all were sent at once.

    Args:
        load: The configuration of the clients.
        rows: The requests.
        duration_s: The time of sending, seconds.
    """
    if load.trace is not None:
        return len(rows) / duration_s if duration_s else None
    if load.rate is None or load.ramp_from is None:
        return load.rate
    return ArrivalRate.of(load, load.rate).mean(duration_s) if duration_s else load.ramp_from


def check_minimums(load: LoadConfig, summary: LoadSummary) -> Minimums | None:
    """Return whether a load reached the minimums of its configuration; None without any.

    Args:
        load: The configuration of the clients.
        summary: The summary of the load.
    """
    if not load.min_duration_s and not load.min_queries:
        return None
    met = summary.elapsed_s >= load.min_duration_s and summary.outcomes.get(OK, 0) >= load.min_queries
    return Minimums(load.min_duration_s, load.min_queries, met)


def merge_rounds(config: RunConfig, rounds: Sequence[LoadMeasurement]) -> LoadMeasurement:
    """Merge all rounds into one load, in which each round begins at the end of the one before it.

    Args:
        config: The resolved configuration of the run.
        rounds: The measurements, in order.

    Returns:
        One measurement with all requests.
    """
    rows, at_s = [], 0.0
    for measurement in rounds:
        rows += [shift_row(row, at_s) for row in measurement.rows]
        at_s += measurement.summary.elapsed_s
    counts = [each.summary.evaluations for each in rounds]
    evaluations = sum(count or 0 for count in counts) if all(counts) else None
    strays = sum(each.summary.strays for each in rounds)
    duration_s = sum(each.summary.duration_s for each in rounds)
    summary = summarize(config, rows, strays, evaluations, duration_s)
    return LoadMeasurement(msgspec.structs.replace(summary, offered_per_s=rounds[0].summary.offered_per_s), rows)


def shift_row(row: RequestRow, by_s: float) -> RequestRow:
    """Return a copy of a request with all its times later by `by_s` seconds."""

    def later(at_s: float | None) -> float | None:
        return None if at_s is None else at_s + by_s

    return msgspec.structs.replace(
        row,
        due_s=row.due_s + by_s,
        sent_s=row.sent_s + by_s,
        began_s=later(row.began_s),
        ended_s=later(row.ended_s),
    )
