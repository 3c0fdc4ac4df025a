"""The table at the end of a run: stages, steps, memory and the paths of all results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.loggers.columns import add_job_columns, add_numbers, print_table
from harness.loggers.load import has_load_record, print_loads
from harness.metrics.difference import Difference
from harness.metrics.fidelity import BROKEN, Check, Fidelity
from harness.metrics.intervals import IntervalEstimate, Share
from harness.metrics.paired import Ratio
from harness.metrics.pretrained import PretrainedScores
from harness.metrics.quality import Quality
from harness.metrics.summary import Summary
from harness.records.comparison import Comparison
from harness.records.job import JobResult
from harness.records.record import DatasetRow, Record, read_record
from harness.records.rerun import describe_rerun
from harness.records.shards import merge_complete

SWEPT = ("step", "request", "answer", "latency_p99")  # ratios that a sweep of comparisons shows, if they were timed
SWEEP_HEADINGS = ("request ms", "step ms", "evaluations", "top-1 %", "fidelity")
SHOWN_OPERATORS = 8  # operators shown of a profile; the record has more
SHOWN_SHARE = 0.005  # share of a request below which a stage is only in comparison.json


def print_record(record: Record, folder: Path, console: Console) -> None:
    """Print one run."""
    summary = record.statistics
    table = Table(title=escape(str(folder)), title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("stage")
    for heading in ("median ms", "interval or range", "", "p90 ms", "n"):
        table.add_column(heading, justify="right")
    for name, row in summary.stage_ms.items():
        table.add_row(name.replace("_", " "), *_cells(row))
    table.add_section()
    if summary.first_step_ms is not None:
        table.add_row("first solver step", *_cells(summary.first_step_ms))
    table.add_row("one solver step", *_cells(summary.step_ms))
    table.add_row("[bold]whole request[/bold]", *_cells(summary.latency_ms))
    console.print(table)
    first = record.first_call
    peaks = ", ".join(f"{peak:.0f}" for peak in summary.peak_memory_mib)
    share = f"{100 * summary.overhead_share.median:.1f} %"
    kind = "video" if any(row.path.endswith(".mp4") for row in record.samples) else "image"
    spared = "" if summary.cache is None else f" of {summary.cache.evaluations:.4g} without a cache"
    console.print(
        f"{summary.throughput_per_s:.2f} {kind}s/s, {summary.nfe} network evaluations per {kind}{spared}, "
        f"harness overhead {share}"
    )
    console.print(
        f"start {first.launch_ms / 1e3:.1f} s, of which loading {first.load_ms / 1e3:.1f} s; "
        f"peak memory MiB by rank: {peaks}"
    )
    console.print(
        f"engine {record.engine.name}; attention {record.attention.requested} ran as {record.attention.resolved}; "
        f"fingerprint {record.fingerprint}"
    )
    if summary.flops_per_step is not None and summary.achieved_tflops is not None:
        share = ""
        if summary.ceiling_tflops:
            reached = 100 * summary.achieved_tflops / summary.ceiling_tflops
            share = f", {reached:.0f} % of the {summary.ceiling_tflops:.2f} of a matrix product here"
        console.print(
            f"{summary.flops_per_step / 1e9:.4g} GFLOP per step at {summary.achieved_tflops:.3f} TFLOP/s{share}"
        )
    if summary.energy_j is not None:
        used, (low, high) = summary.energy_j.median, summary.energy_j.spread
        spread = f"{low:.1f} to {high:.1f}, {summary.energy_j.spread_name}"
        console.print(f"energy per request {used:.1f} J ({spread}), idle power included")
    if summary.comm:
        sent = ", ".join(
            f"{stage.replace('_', ' ')} {sum(t.bytes for t in kinds.values()) / 1e6:.3g} MB "
            f"({sum(t.exposed_ms for t in kinds.values()):.0f} ms waited)"
            for stage, kinds in summary.comm.items()
        )
        console.print(f"sent by the busiest rank: {sent}")
    for network, rows in record.profile.items():
        total = sum(row.self_ms for row in rows)
        shares = ", ".join(f"{row.name} {row.self_ms / total:.0%}" for row in rows[:SHOWN_OPERATORS])
        console.print(f"{network.replace('_', ' ')}, time by operator: {escape(shares)}")
    if record.trace is not None:
        longer = f"{100 * abs(record.trace.overhead):.0f} % {'longer' if record.trace.overhead >= 0 else 'less'}"
        console.print(f"traced request: its stages took {longer} than the median repeat's")
    if record.fidelity is not None:
        print_fidelity(record.fidelity, console)
    if record.quality is not None:
        print_quality(record.quality, console)
    if record.pretrained is not None:
        print_pretrained(record.pretrained, console)
    if record.dataset is not None:
        print_dataset(record.dataset, console)
    for name, value in record.metrics.items():
        console.print(f"{escape(name.replace('_', ' '))} {value:.4g}")
    for line in describe_rerun(record.rerun) if record.rerun is not None else ():
        console.print(escape(line), soft_wrap=True)
    for note in record.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")
    paths = [(f"{kind}s", "samples"), ("grid", "grid.png"), ("record", "record.json"), ("logs", "logs")]
    if record.trace is not None:
        paths.append(("trace", record.trace.path))
    for name, path in paths:
        console.print(f"{name:8} {escape(str(folder / path))}", soft_wrap=True)


def print_fidelity(row: Fidelity, console: Console) -> None:
    """Print the error against the reference and what it means."""
    named = f" ({escape(', '.join(row.methods))})" if row.methods else ""
    console.print(
        f"fidelity: {verdict_markup(row.verdict)}, declared {row.method_class}{named}; latent "
        f"{row.latent.rel_l2:.2g}, pixel {row.pixel.rel_l2:.2g} (relative L2), rounding alone {row.floor_latent:.2g} "
        f"and {row.floor_pixel:.2g}"
    )
    held = ", ".join(f"{check.name} {_within(check)}" for check in row.checks)
    held += f"; not held: {', '.join(row.not_held)}" if row.not_held else ""
    if held:
        console.print(f"held: {held}")
    least = {None: "no error of the method", 0.0: "a single other bit"}.get(
        row.detectable, f"an error of {row.detectable or 0:.1g} of the method"
    )
    took = "" if row.duration_s is None else f"; this took {row.duration_s:.1f} s besides the run"
    made = f", generating {', '.join(row.generated)}" if row.generated else ""
    console.print(f"{least} would have been seen{took}{made}")


def _within(check: Check) -> str:
    found = f"{check.error:.1g} of {check.bound:.1g}"
    return found if check.passed else f"[bold red]{found}[/bold red]"


def verdict_markup(verdict: str) -> str:
    """Return a verdict in words, red if a claim is broken."""
    colour = "bold red" if verdict == BROKEN else "green"
    return f"[{colour}]{verdict.replace('_', ' ')}[/{colour}]"


def print_quality(quality: Quality, console: Console) -> None:
    """Print the scores of one run with their 95 % intervals."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column(f"quality of {quality.scored} images of {quality.names} names")
    for heading in ("value", "95 % interval"):
        table.add_column(heading, justify="right")
    table.add_row(f"prompt retrieval, top-1 (chance {100 * quality.chance:.1f} %)", *_share(quality.top1))
    table.add_row("prompt retrieval, top-5", *_share(quality.top5))
    if quality.top1_style is not None:
        table.add_row(f"top-1 with its style, {quality.top1_style.n} images", *_share(quality.top1_style))
    table.add_row("distance to the requested image (1 = to another name)", *_estimate(quality.distance))
    if quality.mmd2 is not None:
        table.add_row("polynomial MMD2 to the requested images", *_estimate(quality.mmd2))
    if quality.mmd2_real is not None:
        names = f"two sets of {quality.mmd2_real.n} other real names, middle 95 %"
        table.add_row(f"  {names}", *_estimate(quality.mmd2_real))
    console.print(table)
    if quality.unscored:
        console.print(f"{quality.unscored} more images are not scored: the gallery does not have their prompts")


def print_pretrained(scores: PretrainedScores, console: Console) -> None:
    """Print the scores on weights that the user gave."""
    if scores.clip_score is not None:
        value, spread = _estimate(scores.clip_score)
        interval = "" if scores.clip_score.ci95 is None else f" ({spread})"
        console.print(f"CLIP score ({escape(scores.clip or '')}) {value}{interval}")
    if scores.frechet is not None:
        row = scores.frechet
        console.print(
            f"Frechet distance ({escape(scores.extractor or '')}, {row.features} features) {row.value:.4g} for {row.n} "
            f"images against {row.references}; real against real, {row.real_n} each: {row.real:.4g}"
        )


def print_dataset(row: DatasetRow, console: Console) -> None:
    """Print what a run has of a data set, and its categories."""
    jobs = "" if row.shards == 1 else f", shard {', '.join(map(str, row.shard))} of {row.shards}"
    console.print(
        f"{row.images} images of {row.prompts} prompts; {escape(row.file)} has {row.total}, of which {row.sample} were "
        f"taken{jobs}"
    )
    if not row.categories:
        return
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("category")
    shown = {
        "top-1": any(each.top1 is not None for each in row.categories),
        "distance": any(each.distance is not None for each in row.categories),
        "CLIP score": any(each.clip_score is not None for each in row.categories),
    }
    for heading in (
        "images",
        "ms per image",
        "interval or range",
        *(n for name in shown if shown[name] for n in (name, "")),
    ):
        table.add_column(heading, justify="right")
    for each in row.categories:
        low, high = each.duration_ms.spread
        cells = [str(each.images), f"{each.duration_ms.median:.2f}", f"{low:.2f} .. {high:.2f}"]
        if shown["top-1"]:
            cells += _share(each.top1) if each.top1 is not None else ("", "")
        for name, estimate in (("distance", each.distance), ("CLIP score", each.clip_score)):
            if shown[name]:
                cells += _estimate(estimate) if estimate is not None else ("", "")
        table.add_row(escape(each.name), *cells)
    console.print(table)


def print_comparison(comparison: Comparison, folder: Path, console: Console) -> None:
    """Print how candidate B compares with baseline A."""
    table = Table(title=escape(str(folder)), title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    level = f"{100 * next(iter(comparison.ratios.values())).level:.0f} % interval"
    table.add_column("timed")
    for heading in ("a, median ms", "b, median ms", "a / b", level, "detectable", "efficiency"):
        table.add_column(heading, justify="right")
    for name, row in comparison.ratios.items():
        if row.a_ms < SHOWN_SHARE * comparison.headline.a_ms:
            continue
        efficiency = "" if comparison.efficiency is None else f"{100 * comparison.efficiency[name]:.0f} %"
        times = (f"{row.a_ms:.2f}", f"{row.b_ms:.2f}", f"{row.ratio:.3f}")
        spread = (f"{row.interval[0]:.3f} .. {row.interval[1]:.3f}", f"{100 * row.detectable:.1f} %")
        table.add_row(name.replace("_", " "), *times, *spread, efficiency)
    console.print(table)
    console.print(f"a is {escape(' '.join(comparison.a) or 'as composed')}", soft_wrap=True)
    console.print(f"b is {escape(' '.join(comparison.b) or 'as composed')}", soft_wrap=True)
    console.print(describe_ratio(comparison.headline))
    for name in comparison.verdicts:
        record = read_record(folder / name)
        if record is not None and record.fidelity is not None:
            console.print(f"[bold]{name}[/bold]")
            print_fidelity(record.fidelity, console)
    if comparison.output is not None:
        console.print(describe_difference(comparison.output))
    for note in comparison.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")


def describe_ratio(row: Ratio) -> str:
    """Return what the ratio of the whole request says, in words."""
    if not row.differs:
        return f"no difference found; a difference of {100 * row.detectable:.1f} % would be found four times of five"
    faster, by = ("b", row.ratio) if row.ratio > 1 else ("a", 1 / row.ratio)
    other = "a" if faster == "b" else "b"
    return f"{faster} is {by:.3f} times as fast as {other}, from {row.n} rounds"


def describe_difference(output: Difference) -> str:
    """Return how far images differ, in words."""
    if output.identical:
        return "the images are equal, bit for bit"
    ssim = "" if output.ssim is None else f", SSIM {output.ssim:.5f}"
    psnr = "" if output.psnr_db is None else f", PSNR {output.psnr_db:.1f} dB"
    return f"images differ by {output.rel_l2:.2g} (relative L2), at most {output.max_abs:.2g}{psnr}{ssim}"


def print_sweep(jobs: Sequence[JobResult], console: Console) -> None:
    """Print the jobs of a sweep, one row each, and below them each error once, by the number in its rows."""
    if any(job.comparison() is not None for job in jobs):
        _print_comparisons(jobs, console)
        return
    if any(has_load_record(job) for job in jobs):
        print_loads(jobs, console)
        return
    records = [job.record() for job in jobs]
    cells = [_sweep_cells(record) for record in records]
    shown = [name for column, name in enumerate(SWEEP_HEADINGS) if any(row[column] for row in cells)]
    table = Table(show_edge=False, pad_edge=False)
    has_beside = any(record is not None and record.beside for record in records)
    labels = add_job_columns(table, jobs)
    table.add_column("state", no_wrap=True)
    add_numbers(table, [*shown, "beside"] if has_beside else shown)
    errors: dict[str, int] = {}
    for job, label, row, record in zip(jobs, labels, cells, records, strict=True):
        status, colour = job.status, "green" if job.status.state == "ok" else "red"
        number = f" {errors.setdefault(status.error, len(errors) + 1)}" if status.error else ""
        state = f"[{colour}]{status.state}{number}[/{colour}]"
        numbers = [cell for name, cell in zip(SWEEP_HEADINGS, row, strict=True) if name in shown]
        beside = [str(len(record.beside))] if has_beside and record is not None else []
        table.add_row(*label, state, *numbers, *beside)
    print_table(table, console, ["evaluations", "step ms", "top-1 %"])
    if has_beside:
        console.print("beside: other jobs that ran at the same time on one machine, so that their times mix")
    for error, place in errors.items():
        console.print(f"{place}: {escape(error)}", soft_wrap=True)
    console.print(f"folders in {escape(str(jobs[0].folder.parent))}", soft_wrap=True)
    ended_well = {
        job.folder: record
        for job, record in zip(jobs, records, strict=True)
        if job.status.state == "ok" and record is not None
    }
    for merged in merge_complete(ended_well):
        latency_ms, dataset = merged.record.statistics.latency_ms, merged.record.dataset
        median, spread, level, *_ = _cells(latency_ms)
        together = f"[bold]{len(merged.folders)} shards together[/bold]"
        console.print(f"{together}: {median} ms per request ({spread}, {level}), n = {latency_ms.n}")
        if dataset is not None:
            print_dataset(dataset, console)


def _sweep_cells(record: Record | None) -> tuple[str, ...]:
    """Return the cells of one job of a sweep; empty if it left no record."""
    if record is None or record.summary is None:
        return ("",) * 5
    row = record.summary
    found = "" if record.quality is None else f"{100 * record.quality.top1.value:.1f}"
    held = "" if record.fidelity is None else verdict_markup(record.fidelity.verdict)
    return f"{row.latency_ms.median:.1f}", f"{row.step_ms.median:.2f}", str(row.nfe), found, held


def _print_comparisons(jobs: Sequence[JobResult], console: Console) -> None:
    """Print a sweep of comparisons, one row each, with the most important ratios."""
    found = [job.comparison() for job in jobs]
    names = [name for name in SWEPT if any(each is not None and name in each.ratios for each in found)]
    table = Table(show_edge=False, pad_edge=False)
    labels = add_job_columns(table, jobs)
    ratios = [cell for name in names for cell in (f"{name.replace('_', ' ')},\na / b", "interval")]
    add_numbers(table, ["state", *ratios, "efficiency", "difference"])
    errors: dict[str, None] = {}
    for job, label, comparison in zip(jobs, labels, found, strict=True):
        status = job.status
        if comparison is None:
            table.add_row(*label, f"[red]{status.state}[/red]")
            errors |= {status.error: None} if status.error else {}
            continue
        rows = [comparison.ratios.get(name) for name in names]
        cells = [cell for row in rows for cell in (_ratio(row) if row is not None else ("", ""))]
        efficiency = comparison.efficiency
        shown = "" if efficiency is None else f"{100 * efficiency[next(n for n in names if n in efficiency)]:.0f} %"
        apart = "" if comparison.output is None else f"{comparison.output.rel_l2:.1g}"
        table.add_row(*label, status.state, *cells, shown, apart)
    print_table(table, console, ["efficiency", "difference"])
    for error in errors:
        console.print(escape(error), soft_wrap=True)
    console.print(f"folders in {escape(str(jobs[0].folder.parent))}", soft_wrap=True)


def _ratio(row: Ratio) -> tuple[str, str]:
    return f"{row.ratio:.2f}", f"{row.interval[0]:.2f} .. {row.interval[1]:.2f}"


def _share(share: Share) -> tuple[str, str]:
    low, high = share.ci95
    return f"{100 * share.value:.1f} %", f"{100 * low:.1f} .. {100 * high:.1f} %"


def _estimate(estimate: IntervalEstimate) -> tuple[str, str]:
    if estimate.ci95 is None:
        return f"{estimate.value:.3f}", "too few for one"
    low, high = estimate.ci95
    return f"{estimate.value:.3f}", f"{low:.3f} .. {high:.3f}"


def _cells(row: Summary) -> tuple[str, ...]:
    low, high = row.spread
    return (f"{row.median:.2f}", f"{low:.2f} .. {high:.2f}", row.spread_name, f"{row.p90:.2f}", str(row.n))
