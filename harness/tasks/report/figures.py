"""The figures of notebooks/: layouts, speed against error, load, predicted against measured, from what is on disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from harness.costs.plan_file import PredictionCheck
from harness.metrics.fidelity import ROUNDING
from harness.metrics.load import LoadSummary
from harness.metrics.summary import Summary
from harness.tasks.plan.table import layout_label
from harness.tasks.report.families import COLOURS, FAINT, INK, MARKERS, separate_labels
from harness.tasks.report.rows import ReportRow, ReportTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Shown = TypeVar("Shown")
VERDICT_COLOURS = {"broken": COLOURS[1], "approximate": COLOURS[4]}
LOAD_KEYS = ("load.rate", "load.clients")  # keys that vary along a line of the load figure
LABEL_INCHES = 0.19  # between two labels


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
    """Plot the pixel error against the latency, errors within rounding as one level, with the Pareto front as a line.

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
    inches = max(4.6, LABEL_INCHES * len(rows) + 1.4)
    figure, (axes,) = _panels(1, inches)
    least = min((error(row) for row in rows if not within_rounding(row)), default=ROUNDING)
    heights = [least / 5 if within_rounding(row) else error(row) for row in rows]
    for row, height in zip(rows, heights, strict=True):
        x, (low, high) = latency(row), _latency(row).spread
        colour = VERDICT_COLOURS.get(row.verdict or "", COLOURS[2])
        axes.errorbar(x, height, xerr=[[x - low], [high - x]], fmt="o", color=colour, markersize=7, elinewidth=1.2)
    front = pareto(rows)
    by_row = dict(zip(map(id, rows), heights, strict=True))
    axes.plot([latency(row) for row in front], [by_row[id(row)] for row in front], color=FAINT, zorder=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(least / 12, 3 * max(heights))
    if any(within_rounding(row) for row in rows):
        axes.axhline(least / 5, color=FAINT, linewidth=1, zorder=0)
        axes.annotate(
            "within rounding", (0.01, least / 5), (0, 4), ("axes fraction", "data"), "offset points", fontsize=8
        )
    axes.set_ylabel("relative L2 of the pixels from the float32 reference")
    axes.set_xlabel("latency of a request, ms, with its interval, or its range under 4 repeats")
    points = list(zip(map(latency, rows), heights, [row.label for row in rows], strict=True))
    _label_points(axes, points, LABEL_INCHES / (inches - 1.2))
    return figure


def under_load(table: ReportTable) -> Figure:
    """Plot the latency under load and the answers per second against the arrival rate, or the number of clients.

    Args:
        table: The runs of a tree.

    Returns:
        The figure.

    Raises:
        ValueError: No run was loaded.
    """
    rows = [row for row in table.rows if row.load is not None and row.load.latency_ms is not None]
    if not rows:
        raise ValueError("no run was loaded; sweep with task=load load.rate=1,2,4")
    lines: defaultdict[str, list[tuple[float, LoadSummary]]] = defaultdict(list)
    for row in rows:
        values = (f"{key.rpartition('.')[2]}={value}" for key, value in row.values.items() if key not in LOAD_KEYS)
        assert row.load is not None
        rate = row.load.clients if row.load.offered_per_s is None else row.load.offered_per_s
        lines[" ".join(values)].append((float(rate or 0), row.load))
    figure, (left, right) = _panels(2, 4.6)
    for number, (name, points) in enumerate(sorted(lines.items())):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        along = sorted(points, key=lambda point: point[0])
        offered = [point[0] for point in along]
        times = [load.latency_ms for _, load in along if load.latency_ms is not None]
        left.plot(offered, [time.p50 for time in times], color=colour, marker=marker, label=f"{name} p50".strip())
        left.plot(offered, [time.p99 for time in times], ":", color=colour, marker=marker, label=f"{name} p99".strip())
        right.plot(offered, [load.throughput_per_s for _, load in along], color=colour, marker=marker)
        good = [(at, load.goodput_per_s) for at, load in along if load.goodput_per_s is not None]
        right.plot([at for at, _ in good], [count for _, count in good], "--", color=colour, marker=marker)
    left.set_yscale("log")
    left.set_ylabel("latency from the intended arrival, ms")
    left.legend(fontsize=8, frameon=False)
    right.set_ylabel("answers/s, and within the objective (dashed)")
    for panel in (left, right):
        panel.set_xlabel("requests/s that arrive, or clients of a closed loop")
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
    """Return the rows that no other row beats in both error and latency, in the order of their error.

    Errors within rounding are equal, so there is no front if all are.
    """
    if all(within_rounding(row) for row in rows):
        return []
    front: list[ReportRow] = []
    for row in sorted(rows, key=lambda row: (0.0 if within_rounding(row) else error(row), latency(row))):
        if not front or latency(row) < latency(front[-1]):
            front.append(row)
    return front


def within_rounding(row: ReportRow) -> bool:
    """Return whether rounding alone would cause the error of a row's pixels."""
    assert row.pixel is not None
    return row.pixel.identical or (row.rounding is not None and row.pixel.rel_l2 <= row.rounding)


def show_or_say(make: Callable[[], Shown]) -> Shown | None:
    """Return what a notebook shows, or print why there is nothing to show, so that the notebook goes on.

    Args:
        make: Function that makes a figure or a table.

    Returns:
        The figure or table; None if the runs have nothing for it.
    """
    try:
        return make()
    except ValueError as error:
        print(f"Nothing to show: {error}")
        return None


def error(row: ReportRow) -> float:
    """Return the relative L2 error of a row's pixels."""
    assert row.pixel is not None
    return row.pixel.rel_l2


def latency(row: ReportRow) -> float:
    """Return the median latency of a row in ms."""
    return _latency(row).median


def _latency(row: ReportRow) -> Summary:
    assert row.latency is not None
    return row.latency


def _label_points(axes: Axes, points: Sequence[tuple[float, float, str]], gap: float) -> None:
    """Write the name of every point (x, y, name) right of the panel, apart from the others, with a leader line."""
    to_axes = axes.transData + axes.transAxes.inverted()
    order = sorted(points, key=lambda point: (point[1], point[0]))
    ends = [tuple(map(float, to_axes.transform((x, y)))) for x, y, _ in order]
    heights = separate_labels([end[1] for end in ends], min(gap, 1 / max(1, len(order) - 1)))
    for (x, y), height, (_, _, name) in zip(ends, heights, order, strict=True):
        axes.plot([x, 1.01], [y, height], color=FAINT, linewidth=0.6, transform=axes.transAxes, clip_on=False, zorder=0)
        axes.text(1.02, height, name, fontsize=8, va="center", transform=axes.transAxes)


def _panels(count: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, height), dpi=110, layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel in panels:
        panel.grid(color=FAINT, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=INK, labelsize=9)
    return figure, panels
