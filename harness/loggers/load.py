"""The tables of task=load: for one load, and for a sweep of loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.loggers.columns import add_job_columns, add_numbers, print_table
from harness.metrics.load import OK, LoadSummary, ServerRow
from harness.records.job import JobResult
from harness.records.record import Record


def print_load(record: Record, load: LoadSummary, folder: Path, console: Console) -> None:
    """Print one load."""
    table = Table(title=escape(str(folder)), title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("ms")
    for heading in ("p50", "p90", "p99", "mean", "n"):
        table.add_column(heading, justify="right")
    for name, row in (("latency", load.latency_ms), ("in the queue", load.queue_ms), ("sent late", load.late_ms)):
        if row is not None:
            table.add_row(name, *(f"{value:.1f}" for value in (row.p50, row.p90, row.p99, row.mean)), str(row.n))
    console.print(table)
    if load.server is not None:
        console.print(escape(describe_server(load.server)), soft_wrap=True)
    console.print(
        f"{describe_arrivals(load)} over {load.transport} for {load.duration_s:g} s, all answered after "
        f"{load.elapsed_s:.1f} s; of {load.sent}: {describe_outcomes(load)}"
    )
    good = "" if load.goodput_per_s is None else f", {load.goodput_per_s:.2f} within {load.slo_ms:g} ms"
    console.print(f"{load.throughput_per_s:.2f} answers/s{good}{describe_batching(load)}")
    for line in describe_rules(load):
        console.print(line)
    if load.longest_gap_s is not None:
        console.print(f"longest time without an answer {load.longest_gap_s:.2f} s")
    for line in (_describe_neighbours(load), _describe_chaos(load), _describe_memory(load)):
        if line:
            console.print(line)
    for note in record.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")
    for name, path in (("record", "record.json"), ("requests", "requests.jsonl"), ("logs", "logs")):
        if (folder / path).exists():
            console.print(f"{name:8} {escape(str(folder / path))}", soft_wrap=True)


def describe_server(server: ServerRow) -> str:
    """Return which server was measured, and in which dialect."""
    models = ", ".join(server.models) or "it names no model"
    owner = f" of {server.owner}" if server.owner else ""
    return f"engine external: {server.url}{owner} in the dialect {server.dialect}, with {models}"


def describe_arrivals(load: LoadSummary) -> str:
    """Return when requests were sent, in words."""
    if load.arrivals == "at once":
        return f"{load.sent} requests at once"
    if load.offered_per_s is None:
        return f"{load.clients} clients" if load.clients is not None else f"{load.sent} requests of a trace"
    kind = "" if load.arrivals in ("", "Poisson") else f" ({load.arrivals})"
    return f"{load.offered_per_s:g} requests/s offered{kind}"


def describe_rules(load: LoadSummary) -> list[str]:
    """Return whether the minimums and the share of the objective were reached, a line each; empty without them."""
    lines = []
    if load.minimums is not None:
        name = f"of {load.scenario} " if load.scenario else ""
        least = f"{load.minimums.duration_s:g} s and {load.minimums.queries} answers"
        reached = f"{load.elapsed_s:.0f} s and {load.outcomes.get(OK, 0)}"
        verdict = "met" if load.minimums.met else "not met, so this run does not count"
        lines.append(f"minimums {name}({least}): {verdict} ({reached})")
    if load.slo_met is not None:
        lines.append(f"objective of {load.slo_ms:g} ms: {'met' if load.slo_met else 'not met'}")
    return lines


def describe_outcomes(load: LoadSummary) -> str:
    """Return how many requests had which outcome, the successful ones first."""
    parts = sorted(load.outcomes.items(), key=lambda part: (part[0] != OK, part[0]))
    strays = [f"and {load.strays} answers that matched no request"] if load.strays else []
    return ", ".join([*(f"{count} {kind}" for kind, count in parts), *strays]) or "none"


def describe_batching(load: LoadSummary) -> str:
    """Return how many images shared a forward, in words; empty if the engine did not say."""
    if load.images_per_evaluation is None:
        return ""
    return f"; {load.evaluations} forwards of the denoiser, {load.images_per_evaluation:.2f} images each"


def _describe_chaos(load: LoadSummary) -> str:
    """Return what was killed, in words; empty if nothing was."""
    if load.chaos is None or not (load.chaos.kills or load.chaos.leaked):
        return ""
    ranks = ", ".join(f"rank {kill.rank} after {kill.at_s:.0f} s" for kill in load.chaos.killed)
    return (
        f"{load.chaos.kills} ranks were killed{f' ({ranks})' if ranks else ''}; "
        f"{load.chaos.leaked} processes outlived the server"
    )


def _describe_neighbours(load: LoadSummary) -> str:
    """Return the median latency beside busy processes, in words; empty if there were none."""
    parts = [f"{row.neighbours}: {row.latency_ms.p50:.0f} ms ({row.slowdown:.2f} times)" for row in load.neighbours]
    return f"median latency beside busy processes, by their number: {', '.join(parts)}" if parts else ""


def _describe_memory(load: LoadSummary) -> str:
    """Return how the server's memory grew, in words; empty if it was not sampled."""
    if load.memory is None:
        return ""
    row = load.memory
    late = "" if row.late_slope_mib_per_min is None else f", {row.late_slope_mib_per_min:+.2f} in the last two thirds"
    return (
        f"server's resident memory {row.start_mib:.0f} MiB at the start, {row.end_mib:.0f} at the end, "
        f"{row.slope_mib_per_min:+.2f} per minute{late}"
    )


def has_load_record(job: JobResult) -> bool:
    """Return whether a job left a load's record."""
    record = job.record()
    return record is not None and record.load is not None


def print_loads(jobs: Sequence[JobResult], console: Console) -> None:
    """Print the loads of a sweep, one row each, and below them each error once."""
    table = Table(show_edge=False, pad_edge=False)
    labels = add_job_columns(table, jobs)
    table.add_column("state", no_wrap=True)
    add_numbers(table, ["offered/s", "answers/s", "p50 ms", "p99 ms", "good/s", "per\nforward", "not ok"])
    errors: dict[str, None] = {}
    for job, label in zip(jobs, labels, strict=True):
        status, record = job.status, job.record()
        cells = [""] * 7 if record is None or record.load is None else _cells(record.load)
        colour = "green" if status.state == "ok" else "red"
        table.add_row(*label, f"[{colour}]{status.state}[/{colour}]", *cells)
        errors |= {status.error: None} if status.error else {}
    print_table(table, console, ["per\nforward", "good/s", "p50 ms"])
    for error in errors:
        console.print(escape(error), soft_wrap=True)
    console.print(f"folders in {escape(str(jobs[0].folder.parent))}", soft_wrap=True)


def _cells(load: LoadSummary) -> list[str]:
    def number(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    offered = describe_arrivals(load) if load.offered_per_s is None else f"{load.offered_per_s:g}"
    latency = load.latency_ms
    return [
        offered,
        number(load.throughput_per_s),
        number(None if latency is None else latency.p50, 0),
        number(None if latency is None else latency.p99, 0),
        number(load.goodput_per_s),
        number(load.images_per_evaluation),
        str(load.sent - load.outcomes.get(OK, 0)),
    ]
