"""Quality against network evaluations, as a figure and a table: one panel per family, one line per solver.

    python -m harness -m experiment=families
    python -m harness.tasks.report.families sweeps/DATE/TIME --out DIR [--readme README.md --budget 8 --budget 24]

The command writes `families.png` and `families.md`. With --readme, the table replaces the text between the two markers
`<!-- families:begin -->` and `<!-- families:end -->` of that file.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.metrics.intervals import IntervalEstimate, Share
from harness.tasks.common.terminal import EXIT_BAD_INPUT, print_error
from harness.tasks.report.markers import replace_between
from harness.tasks.report.sweep import FAMILIES, Sweep, SweepPoint, best_within_budget, read_sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKER = "families"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")  # Okabe and Ito 2008
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
INK, FAINT = "#222222", "#D9D9D9"
LABEL_GAP = 0.052  # of a panel's height, between two labels


@dataclass(frozen=True)
class Metric:
    """A quality metric on the figure's y-axis.

    Attributes:
        label: Label of the axis.
        of: Function that returns the metric of a point, with its interval.
        log: Whether the axis is logarithmic.
        scale: Factor from the metric to the axis.
    """

    label: str
    of: Callable[[SweepPoint], Share | IntervalEstimate]
    log: bool
    scale: float


METRICS = {
    "distance": Metric(
        "distance to the requested image\n(1 = to another name; lower is better)",
        lambda p: p.quality.distance,
        True,
        1,
    ),
    "top1": Metric("prompt retrieval, top-1 (%; higher is better)", lambda p: p.quality.top1, False, 100),
}


def plot_sweep(sweep: Sweep, metric: Metric, path: Path) -> None:
    """Write the figure of a sweep.

    Args:
        sweep: Scored points; at least one.
        metric: Metric on the y-axis.
        path: Image file to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    families = sweep.families
    figure = Figure(figsize=(4.6 * len(families) + 0.6, 5.0), dpi=160, layout="constrained")
    panels = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    ticks = sorted({point.nfe for point in sweep.points})
    ticks = [tick for k, tick in enumerate(ticks) if k == 0 or tick >= 1.25 * ticks[k - 1]] or ticks
    values = [metric.of(point).value for point in sweep.points]
    subs = (1, 2, 5) if max(values) > 8 * min(values) else (1, 1.5, 2, 3, 5, 7)
    for panel, family in zip(panels, families, strict=True):
        panel.set_xscale("log")
        panel.set_yscale("log" if metric.log else "linear")
        panel.set_title(FAMILIES.get(family, family), loc="left", fontweight="bold", color=INK)
        panel.set_xlabel("network evaluations per image", color=INK)
        panel.xaxis.set_major_locator(FixedLocator(ticks))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        panel.xaxis.set_minor_locator(NullLocator())
        if metric.log:
            panel.yaxis.set_major_locator(LogLocator(subs=subs))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(axis="y", color=FAINT, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=INK, labelsize=9)
        for line in sweep.lines:
            _plot_line(panel, sweep, family, line, metric)
    panels[0].set_ylabel(metric.label, color=INK)
    first, last = min(p.nfe for p in sweep.points), max(p.nfe for p in sweep.points)
    for panel, family in zip(panels, families, strict=True):
        panel.set_xlim(first / 1.12, last * (last / first) ** 0.46)  # room for the labels on the right
        _plot_labels(panel, sweep, family, metric)
    scored = sweep.points[0].quality
    figure.supxlabel(
        f"{scored.scored} images of {scored.names} names per point, the same noise for every solver;"
        + ("\n" if len(families) == 1 else " ")
        + "bars are 95 % intervals",
        fontsize=9,
        color="#555555",
    )
    figure.savefig(path)


def table(sweep: Sweep, budgets: Sequence[int] = ()) -> str:
    """Format the points as a markdown table, with the best of each family at each number of evaluations in bold.

    Args:
        sweep: Scored points.
        budgets: Numbers of evaluations; only the best point of each solver within each is shown. Empty: every point.

    Returns:
        The table, and a line that counts the runs left out.
    """
    rows = ["| family | solver | evaluations | top-1 | distance |", "|---|---|---|---|---|"]
    for family in sweep.families:
        lines = [points for line in sweep.lines if (points := sweep.line_points(family, line))]
        title = FAMILIES.get(family, family)
        for budget in budgets:
            rows += _rows(
                f"{title}, at most {budget}", [p for points in lines if (p := best_within_budget(points, budget))]
            )
        every = [point for points in lines for point in points] if not budgets else []
        for nfe in sorted({point.nfe for point in every}):
            rows += _rows(title, [point for point in every if point.nfe == nfe])
    if sweep.left_out:
        counts = Counter(reason.partition(":")[0] for reason in sweep.left_out.values())
        rows += [
            "",
            "Not in the table: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) + ".",
        ]
    return "\n".join(rows) + "\n"


def _rows(title: str, group: Sequence[SweepPoint]) -> list[str]:
    """Return the table rows of points that may be compared with each other, best distance first."""
    group = sorted(group, key=lambda point: point.quality.distance.value)
    top = max((point.quality.top1.hits for point in group), default=0)
    rows = []
    for index, point in enumerate(group):
        top1, distance = point.quality.top1, point.quality.distance
        share = f"{100 * top1.value:.0f} % ({100 * top1.ci95[0]:.0f} to {100 * top1.ci95[1]:.0f})"
        gap = f"{distance.value:.3f}"
        if distance.ci95 is not None:
            gap += f" ({distance.ci95[0]:.3f} to {distance.ci95[1]:.3f})"
        cells = [
            title,
            f"`{point.line}`",
            str(point.nfe),
            _bold(share, top1.hits == top and len(group) > 1),
            _bold(gap, index == 0 and len(group) > 1),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _bold(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def _style(sweep: Sweep, line: str) -> tuple[str, str]:
    """Return the colour and the marker of a line, the same in every panel; from the ninth line on, colours repeat."""
    index = sweep.lines.index(line)
    return COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def _plot_line(panel: Axes, sweep: Sweep, family: str, line: str, metric: Metric) -> None:
    points = sweep.line_points(family, line)
    if not points:
        return
    colour, marker = _style(sweep, line)
    count = len(sweep.lines)
    shift = 1 + 0.03 * (sweep.lines.index(line) - (count - 1) / 2) / max(1, count / 2)  # bars side by side
    x = [point.nfe * shift for point in points]
    y = [metric.scale * metric.of(point).value for point in points]
    low = [metric.scale * (metric.of(point).value - metric.of(point).bounds[0]) for point in points]
    high = [metric.scale * (metric.of(point).bounds[1] - metric.of(point).value) for point in points]
    bars = [[max(0.0, value) for value in side] for side in (low, high)]
    panel.errorbar(
        x,
        y,
        yerr=bars,
        color=colour,
        marker=marker,
        markersize=6,
        linewidth=1.6,
        elinewidth=0.9,
        zorder=3,
        markeredgecolor="white",
        markeredgewidth=0.6,
    )


def _plot_labels(panel: Axes, sweep: Sweep, family: str, metric: Metric) -> None:
    """Write each line's name at its right end, apart from the others, with a thin line that leads to it."""
    ends = [(line, points[-1]) for line in sweep.lines if (points := sweep.line_points(family, line))]
    to_axes = panel.transData + panel.transAxes.inverted()
    positions = {line: to_axes.transform((p.nfe, metric.scale * metric.of(p).value)) for line, p in ends}
    right = max((float(position[0]) for position in positions.values()), default=0.0) + 0.05
    order = sorted(positions, key=lambda line: float(positions[line][1]))
    heights = [
        0.03 + 0.97 * height for height in separate_labels([float(positions[line][1]) for line in order], LABEL_GAP)
    ]
    for line, height in zip(order, heights, strict=True):
        x, y = (float(value) for value in positions[line])
        colour, _ = _style(sweep, line)
        panel.plot([x, right - 0.008], [y, height], color=colour, linewidth=0.6, alpha=0.6, transform=panel.transAxes)
        panel.text(right, height, line, color=colour, fontsize=9, va="center", transform=panel.transAxes, clip_on=False)


def separate_labels(heights: Sequence[float], gap: float) -> list[float]:
    """Move rising heights as little as possible until they are `gap` apart and between 0 and 1.

    Heights whose labels touch form a group, which is centred on its mean. If there are too many heights for the gap,
    some leave the range.

    Args:
        heights: Heights in rising order, as shares of the panel.
        gap: Smallest distance of two labels, as a share of the panel.

    Returns:
        The new heights, in the same order.
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-1], gap) - _top(groups[-2], gap) < gap - 1e-12:
            last = groups.pop()
            groups[-1] += last
    free = [_bottom(group, gap) + gap * k for group in groups for k in range(len(group))]
    low = [max(height, gap * k) for k, height in enumerate(free)]
    return [min(height, 1 - gap * (len(low) - 1 - k)) for k, height in enumerate(low)]


def _bottom(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[float], gap: float) -> float:
    return _bottom(group, gap) + gap * (len(group) - 1)


def read_scored(folder: Path) -> Sweep:
    """Read a sweep that has at least one scored run.

    Args:
        folder: Folder with run folders at any depth.

    Returns:
        The sweep.

    Raises:
        ValueError: No run is scored, or the runs do not compare.
    """
    sweep = read_sweep(folder)
    if not sweep.points:
        reasons = "; ".join(sorted(set(sweep.left_out.values()))) or "no records"
        raise ValueError(f"{folder} holds no scored run ({reasons})")
    return sweep


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The command line; None means the process's own.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m harness.tasks.report.families", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("sweep", type=Path, help="a sweep's folder, or any folder of records")
    parser.add_argument("--out", type=Path, default=Path(), help="where families.png and families.md go")
    parser.add_argument("--metric", choices=METRICS, default="distance", help="what the figure shows")
    parser.add_argument("--budget", type=int, action="append", default=[], help="table: evaluations; may be repeated")
    parser.add_argument("--readme", type=Path, help="a file whose text between the markers becomes the table")
    options = parser.parse_args(arguments)
    try:
        sweep = read_scored(options.sweep)
        options.out.mkdir(parents=True, exist_ok=True)
        rows = table(sweep, sorted(options.budget))
        (options.out / "families.md").write_text(rows, encoding="utf-8")
        if options.readme is not None:
            text = options.readme.read_text(encoding="utf-8")
            options.readme.write_text(replace_between(text, MARKER, rows), encoding="utf-8")
        plot_sweep(sweep, METRICS[options.metric], options.out / "families.png")
    except ModuleNotFoundError as error:
        print_error(f"the figure needs {error.name}: pip install 'triptych[notebooks]'")
        return EXIT_BAD_INPUT
    except (ValueError, OSError) as error:
        print_error(error)
        return EXIT_BAD_INPUT
    for reason, count in Counter(sweep.left_out.values()).items():
        print_error(f"{count} runs left out: {reason}")
    print(f"{len(sweep.points)} points: {options.out / 'families.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
