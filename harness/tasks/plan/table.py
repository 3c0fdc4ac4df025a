"""The tables of task=plan: layouts by predicted time, or predictions against records."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.config.schema import ParallelConfig
from harness.costs.plan_file import LayoutPrediction, Plan, PredictionCheck
from harness.loggers.columns import add_numbers, print_table
from harness.parallel.mesh import AXES

HEADINGS = (
    "ranks",
    "step\nms",
    "compute\nms",
    "memory\nms",
    "exposed\nms",
    "speed-up",
    "GB per\nrank",
    "MB\nsent",
    "fits",
)
SPARE = ("memory\nms", "compute\nms", "MB\nsent", "exposed\nms")  # columns that a narrow terminal does not show


def layout_label(layout: ParallelConfig) -> str:
    """Return a short name of a layout, such as `cfg2 ulysses4`; `single` for one rank."""
    names = [f"{axis}{size}" for axis in (*AXES, "pipe") if (size := getattr(layout, axis)) > 1]
    return " ".join([*names, *["displaced"] * layout.displaced]) or "single"


def print_plan(plan: Plan, rows: int, folder: Path, console: Console) -> None:
    """Print the first layouts of a plan.

    Args:
        plan: The plan.
        rows: Largest number of layouts to print.
        folder: The run's folder, named below the table.
        console: Console for the table.
    """
    model = plan.config["model"]["name"]
    title = f"prediction, nothing of this was run: {model} on {plan.hardware.name}"
    table = Table(title=escape(title), title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("layout", no_wrap=True)
    add_numbers(table, HEADINGS)
    single = next((row for row in plan.layouts if row.ranks == 1), None)
    for row in plan.layouts[:rows]:
        table.add_row(layout_label(row.layout), *_cells(row, single))
    print_table(table, console, SPARE)
    if len(plan.layouts) > rows:
        console.print(f"{len(plan.layouts) - rows} more in plan.json (plan.rows={len(plan.layouts)} shows them)")
    console.print("speed-up is of the request's denoising, over one rank; a step is one evaluation of the denoiser")
    _print_origin(plan, folder, console)


def _cells(row: LayoutPrediction, single: LayoutPrediction | None) -> list[str]:
    sent = sum(exchange.bytes for exchange in row.exchanges)
    return [
        str(row.ranks),
        f"{row.step_ms:.4g}",
        f"{row.compute_ms:.4g}",
        f"{row.memory_ms:.4g}",
        f"{row.exposed_ms:.3g}",
        "" if single is None else f"{single.denoising_ms / row.denoising_ms:.2f}",
        f"{row.memory_bytes / 1e9:.3g}",
        f"{sent / 1e6:.4g}",
        "yes" if row.fits else "no",
    ]


def print_checks(plan: Plan, folder: Path, console: Console) -> None:
    """Print every record with its prediction.

    Args:
        plan: The plan, with checks.
        folder: The run's folder, named below the table.
        console: Console for the table.
    """
    title = f"predictions for {plan.hardware.name} against records"
    table = Table(title=escape(title), title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("layout", no_wrap=True)
    table.add_column("threads", justify="right", no_wrap=True)
    table.add_column("step ms", justify="right", no_wrap=True)
    table.add_column("predicted", justify="right")
    add_numbers(table, ["error", "bytes", "FLOPs"])
    for check in plan.checks:
        table.add_row(escape(check.folder), layout_label(check.layout), str(check.threads), *_check_cells(check))
    print_table(table, console, ["FLOPs", "bytes", "threads"])
    _print_origin(plan, folder, console)


def _check_cells(check: PredictionCheck) -> list[str]:
    sent = _compared_bytes(check)
    if check.predicted_step_ms is None or check.error is None:
        return [f"{check.step_ms:.4g}", escape(check.reason or ""), "", sent if check.predicted_bytes else "", ""]
    counted = "not counted" if check.flops is None else "not predicted"
    if check.flops is not None and check.predicted_flops is not None:
        counted = "equal" if check.flops == check.predicted_flops else f"{check.flops:.6g}, {check.predicted_flops:.6g}"
    return [
        f"{check.step_ms:.4g}",
        f"{check.predicted_step_ms:.4g}",
        f"{100 * check.error:+.0f} %",
        sent,
        counted,
    ]


def _compared_bytes(check: PredictionCheck) -> str:
    measured = (check.sent_bytes, check.decoding_bytes)
    predicted = (check.predicted_bytes, check.predicted_decoding_bytes)
    if measured == predicted:
        return "equal"
    return ", ".join(f"{sum(sum(kinds.values()) for kinds in stages):,}" for stages in (measured, predicted))


def _print_origin(plan: Plan, folder: Path, console: Console) -> None:
    if plan.measured:
        rates = ", ".join(f"{name} {getattr(plan.hardware, name):.4g}" for name in plan.measured)
        console.print(f"measured on this machine: {rates}")
    console.print(f"{escape(str(folder))}/plan.json has every number", soft_wrap=True)
