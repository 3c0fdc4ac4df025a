"""The table at the end of a run: stages, steps, memory and where everything is."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from harness.metrics.summary import Summary
from harness.records import Record


def print_record(record: Record, folder: Path, console: Console) -> None:
    """Prints one run."""
    summary = record.summary
    table = Table(title=f"{folder}", title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("stage")
    for heading in ("median ms", "95 % interval", "p90 ms", "n"):
        table.add_column(heading, justify="right")
    for name, row in summary.stage_ms.items():
        table.add_row(name.replace("_", " "), *_cells(row))
    table.add_section()
    table.add_row("one solver step", *_cells(summary.step_ms))
    table.add_row("[bold]whole request[/bold]", *_cells(summary.latency_ms))
    console.print(table)
    first = record.first_call
    peaks = ", ".join(f"{peak:.0f}" for peak in summary.peak_memory_mib)
    share = f"{100 * summary.overhead_share.median:.1f} %"
    console.print(
        f"{summary.throughput_per_s:.2f} pictures/s, {summary.nfe} network evaluations a picture, "
        f"harness overhead {share}"
    )
    console.print(
        f"start {first.launch_ms / 1e3:.1f} s, of which loading {first.load_ms / 1e3:.1f} s; "
        f"peak memory MiB by rank: {peaks}"
    )
    console.print(
        f"attention {record.attention.requested} ran as {record.attention.resolved}; fingerprint {record.fingerprint}"
    )
    for note in record.notes:
        console.print(f"[yellow]note:[/yellow] {note}")
    console.print(f"pictures {folder / 'samples'}\ngrid     {folder / 'grid.png'}\nrecord   {folder / 'record.json'}")


def _cells(row: Summary) -> tuple[str, str, str, str]:
    return (f"{row.median:.2f}", f"{row.ci95[0]:.2f} .. {row.ci95[1]:.2f}", f"{row.p90:.2f}", str(row.n))
