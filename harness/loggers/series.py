"""Series of a wandb run, each over an axis of its own: repeats, solver steps, and the seconds of a load."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from harness.metrics.load import OK, RequestRow
from harness.records.record import BETWEEN_STAGES, Record, Repeat

if TYPE_CHECKING:
    import wandb

Point = dict[str, float]
WINDOWS = 60  # points of a load


@dataclass(frozen=True)
class Series:
    """Points over one axis.

    Attributes:
        axis: Name of the axis, which every point has.
        points: Values by metric.
    """

    axis: str
    points: Sequence[Point]

    @property
    def metrics(self) -> list[str]:
        """The metrics, those below one name as a pattern such as `stage_ms/*`."""
        names = dict.fromkeys(name for point in self.points for name in point if name != self.axis)
        return list(dict.fromkeys(f"{name.partition('/')[0]}/*" if "/" in name else name for name in names))


def define_axis(run: wandb.Run, axis: str, metrics: Sequence[str]) -> None:
    """Say over which axis metrics are shown, and that the summary needs none of them.

    Args:
        run: The open run.
        axis: Name of the axis.
        metrics: Names or patterns of metrics.
    """
    run.define_metric(axis, hidden=True, summary="none")
    for metric in metrics:
        run.define_metric(metric, step_metric=axis, summary="none")


def log_series(run: wandb.Run, series: Series, timestamp: float | None) -> None:
    """Log all points of a series.

    Args:
        run: The open run.
        series: The series.
        timestamp: Time of the measurement, s since 1970; None is the time of logging.
    """
    if not series.points:
        return
    define_axis(run, series.axis, series.metrics)
    when = {} if timestamp is None else {"_timestamp": timestamp}
    for point in series.points:
        run.log({**point, **when})


def repeat_series(record: Record) -> Series:
    """Return latency, stages, networks, memory and the machine's load over the repeats."""
    return Series("repeat", [{"repeat": number, **_repeat(row)} for number, row in enumerate(record.repeats)])


def step_series(record: Record) -> Series:
    """Return the time of each solver step: the median over the repeats, the shortest and the longest."""
    times: dict[int, list[float]] = {}
    for repeat in record.repeats:
        for step in repeat.denoise_steps_ms:
            times.setdefault(step.step, []).append(step.duration_ms)
    return Series(
        "step",
        [
            {
                "step": number,
                "step_ms/median": statistics.median(row),
                "step_ms/low": min(row),
                "step_ms/high": max(row),
            }
            for number, row in sorted(times.items())
        ],
    )


def pair_series(records: dict[str, Record]) -> Series:
    """Return the latency of both configurations of a comparison over its rounds.

    Args:
        records: The records by the names of the configurations.
    """
    rounds = zip(*(record.repeats for record in records.values()), strict=False)
    return Series(
        "repeat",
        [
            {
                "repeat": number,
                **{f"{name}/latency_ms": row.total_duration_ms for name, row in zip(records, rows, strict=True)},
            }
            for number, rows in enumerate(rounds)
        ],
    )


def load_series(rows: Sequence[RequestRow], elapsed_s: float) -> Series:
    """Return answers, failures and latency over the time of a load, in windows of at least a second.

    Args:
        rows: Every request that was sent.
        elapsed_s: Time of the load, s.

    Returns:
        The series; each point lies at the end of its window.
    """
    width = max(1.0, elapsed_s / WINDOWS)
    windows: dict[int, list[RequestRow]] = {}
    for row in rows:
        windows.setdefault(int((row.sent_s if row.ended_s is None else row.ended_s) // width), []).append(row)
    return Series("elapsed_s", [_window(windows.get(k, []), k, width) for k in range(max(windows, default=-1) + 1)])


def read_requests(folder: Path) -> list[RequestRow]:
    """Return the requests of a load's folder; none if the file is not there."""
    file = folder / "requests.jsonl"
    return msgspec.json.Decoder(RequestRow).decode_lines(file.read_bytes()) if file.exists() else []


def _repeat(row: Repeat) -> Point:
    machine = {} if row.machine is None else msgspec.to_builtins(row.machine)
    return {
        "latency_ms": row.total_duration_ms,
        **{f"stage_ms/{stage.name}": stage.duration_ms for stage in row.steps},
        f"stage_ms/{BETWEEN_STAGES}": row.between_stages_ms,
        **{f"networks_ms/{name}": value for name, value in row.networks_ms.items()},
        **{f"memory_mib/{point.name}": point.used_mib for point in row.memory_checkpoints},
        **{f"machine/{name}": value for name, value in machine.items() if value is not None},
    }


def _window(rows: Sequence[RequestRow], number: int, width: float) -> Point:
    good = [row.latency_ms for row in rows if row.outcome == OK]
    point = {
        "elapsed_s": (number + 1) * width,
        "load/answers_per_s": len(good) / width,
        "load/not_ok": len(rows) - len(good),
    }
    if good:
        p50, p99 = np.quantile(good, [0.5, 0.99])
        point |= {"load/latency_ms_p50": float(p50), "load/latency_ms_p99": float(p99)}
    return point
