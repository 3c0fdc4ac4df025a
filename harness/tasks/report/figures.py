"""The figures of notebooks/: layouts, speed against error, predicted against measured. Each reads what is on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.costs.plan_file import PredictionCheck
from harness.tasks.plan.table import layout_label
from harness.tasks.report.families import COLOURS, FAINT, INK
from harness.tasks.report.rows import ReportRow, ReportTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def scaling(table: ReportTable) -> Figure:
    """Plot the speed-up of every layout over its one-rank run, beside the bytes that its busiest rank sends.

    Args:
        table: The runs of a tree.

    Returns:
        The figure.

    Raises:
        ValueError: No run on several ranks has a matching one-rank run.
    """
    rows = sorted((row for row in table.rows if row.scaling is not None), key=lambda row: (row.ranks or 0, row.label))
    if not rows:
        raise ValueError(
            "no run on several ranks has a matching one-rank run; sweep parallel=single,... over one request"
        )
    figure, (left, right) = _panels(2, 0.5 * len(rows) + 1.6)
    positions = range(len(rows))
    for position, row in zip(positions, rows, strict=True):
        assert row.scaling is not None
        found = row.scaling.speedup
        low, high = found.bounds
        bars = [[found.value - low], [high - found.value]]
        left.errorbar(found.value, position, xerr=bars, fmt="o", color=COLOURS[0], markersize=7, elinewidth=1.2)
        left.plot(row.scaling.ranks, position, "|", color=INK, markersize=18)
        left.annotate(
            f"{100 * row.scaling.efficiency:.0f} %", (found.value, position), (0, 9), textcoords="offset points"
        )
    left.axvline(1, color=FAINT, linewidth=1)
    left.set_xlim(left=0)
    left.set_yticks(list(positions), [row.label for row in rows])
    left.set_xlabel("speed-up of a request, with efficiency; | marks the number of ranks")
    right.barh(list(positions), [row.comm_mb or 0.0 for row in rows], color=COLOURS[5])
    right.set_yticks([])
    right.set_xlabel("MB sent by the busiest rank per request")
    return figure


def fidelity(table: ReportTable) -> Figure:
    """Plot latency against the pixel error, bit-identical runs on the left edge, with the Pareto front as a line.

    Args:
        table: The runs of a tree.

    Returns:
        The figure.

    Raises:
        ValueError: No run has a measured error.
    """
    rows = [row for row in table.rows if row.pixel is not None and row.latency is not None]
    if not rows:
        raise ValueError("no run was compared with a reference; sweep with task=bench or task.fidelity=true")
    figure, (axes,) = _panels(1, 4.6)
    least = min((error(row) for row in rows if error(row) > 0), default=1e-8) / 10
    for row in rows:
        colour = {"broken": COLOURS[1], "approximate": COLOURS[4]}.get(row.verdict or "", COLOURS[2])
        x = max(error(row), least)
        assert row.latency is not None
        low, high = row.latency.spread
        bars = [[row.latency.median - low], [high - row.latency.median]]
        axes.errorbar(x, row.latency.median, yerr=bars, fmt="o", color=colour, markersize=7, elinewidth=1.2)
        axes.annotate(row.label, (x, row.latency.median), (7, 3), textcoords="offset points", fontsize=8)
    front = pareto(rows)
    axes.plot([max(error(row), least) for row in front], [latency(row) for row in front], color=FAINT, zorder=0)
    axes.set_xscale("log")
    axes.set_xlabel(f"relative L2 of the pixels from the float32 reference; bit-identical runs are at {least:.0e}")
    axes.set_ylabel("latency of a request, ms, with its interval, or its range under 4 repeats")
    return figure


def roofline(checks: Sequence[PredictionCheck]) -> Figure:
    """Plot predicted against measured step time, one point per run.

    Args:
        checks: Records with their predictions.

    Returns:
        The figure.

    Raises:
        ValueError: Nothing was predicted.
    """
    found = [(check, check.predicted_step_ms) for check in checks if check.predicted_step_ms is not None]
    if not found:
        raise ValueError("no record has a prediction; run task=plan hardware=measured plan.runs=DIR")
    figure, (axes,) = _panels(1, 4.6)
    times = [time for check, predicted in found for time in (check.step_ms, predicted)]
    ends = (0.7 * min(times), 1.4 * max(times))
    axes.plot(ends, ends, color=FAINT, zorder=0)
    for check, predicted in found:
        point = (check.step_ms, predicted)
        axes.plot(*point, "o", color=COLOURS[0], markersize=7)
        label = f"{layout_label(check.layout)}, {100 * (predicted / check.step_ms - 1):+.0f} %"
        axes.annotate(label, point, (7, -3), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured, ms per step")
    axes.set_ylabel("predicted, ms per step")
    return figure


def pareto(rows: Sequence[ReportRow]) -> list[ReportRow]:
    """Return the rows that no other row beats in both error and latency, in the order of their error."""
    front: list[ReportRow] = []
    for row in sorted(rows, key=lambda row: (error(row), latency(row))):
        if not front or latency(row) < latency(front[-1]):
            front.append(row)
    return front


def error(row: ReportRow) -> float:
    """Return the relative L2 error of a row's pixels."""
    assert row.pixel is not None
    return row.pixel.rel_l2


def latency(row: ReportRow) -> float:
    """Return the median latency of a row in ms."""
    assert row.latency is not None
    return row.latency.median


def _panels(count: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, height), dpi=110, layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel in panels:
        panel.grid(color=FAINT, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=INK, labelsize=9)
    return figure, panels
