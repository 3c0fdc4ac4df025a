"""What one load measured, and several of them as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from harness.config.schema import RunConfig
from harness.metrics.load import LoadSummary, RequestRow, summarize_load


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
    config: RunConfig, rows: Sequence[RequestRow], strays: int, evaluations: int | None, rounds: int = 1
) -> LoadSummary:
    """Summarise one load, or several rounds of it in sequence.

    Args:
        config: The resolved configuration of the load.
        rows: Every request.
        strays: The number of answers to requests that were not outstanding.
        evaluations: The number of the denoiser's forwards, if the engine reports it.
        rounds: The number of rounds.

    Returns:
        The summary for the record.
    """
    load = config.load
    return summarize_load(
        rows,
        load.transport.name,
        load.rate,
        load.clients,
        load.duration_s * rounds,
        load.slo_ms,
        strays,
        evaluations,
    )


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
    return LoadMeasurement(summarize(config, rows, strays, evaluations, len(rounds)), rows)


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
