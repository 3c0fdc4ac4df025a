"""A tree of runs as the rows of a page: every run is a row, whether it ended well, failed or cannot be read."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import yaml

from harness.messages import total_sent_bytes
from harness.metrics.difference import Difference
from harness.metrics.fidelity import rounding_bound
from harness.metrics.intervals import IntervalEstimate, Share
from harness.metrics.load import LoadSummary
from harness.metrics.summary import Summary
from harness.records.comparison import Comparison, read_comparison
from harness.records.record import (
    OF_USER,
    CacheUse,
    CategoryRow,
    Record,
    RunFolderError,
    Statistics,
    Status,
    read_record,
    read_status,
)
from harness.records.search import read_search
from harness.records.shards import merge_complete
from harness.tasks.report.equal_latency import EqualLatencyBaseline, equal_latency_baselines
from harness.tasks.report.keys import Cell, cells, run_labels, varying_keys
from harness.tasks.report.scaling import Scaling, scalings
from harness.tasks.report.sweep import flatten

FILES = ("status.json", "record.json", "comparison.json")  # a folder with any of them is a run
OF_ONE_RUN = ("started", "ended", "command")  # parts of the provenance that differ in every run
THUMBNAIL = (600, 900)  # largest width and height, pixels
SMALL_THUMBNAIL = (300, 450)
MANY = 100  # runs from which on thumbnails are small
WEBP_QUALITY = 82
NOT_MEASURED = (*OF_USER, "logger", "hydra", "task.references", "launch.reuse")  # overrides that change no number


class ReportRow(msgspec.Struct, frozen=True):
    """One run of a report; None marks what was not measured.

    Attributes:
        label: Short and unique name of the run.
        folder: The run's folder, relative to the tree.
        state: State in which the run ended.
        error: Message of the status, followed by what could not be read.
        values: Values of the configuration keys that differ between runs.
        notes: Notes of the record or the comparison.
        latency: Latency of one request, ms.
        repeats_ms: Latency of every repeat, ms.
        step: Duration of one solver step after the first, ms.
        first_step: Duration of the first solver step, ms.
        stages: Median duration of each stage, ms.
        load: Measurements of the clients of task=load.
        nfe: Network evaluations per request.
        memory_mib: Peak memory of the largest rank, MiB.
        tflops: Achieved rate, TFLOP/s.
        ceiling_share: Achieved rate over that of a matrix product on the same ranks, in [0, 1].
        comm_mb: Traffic that one rank sends per request, MB.
        verdict: Result of the comparison with the reference.
        declared: Class that the run's methods claim.
        pixel: Error of the pixels against the reference.
        rounding: Largest relative L2 error of the pixels that counts as rounding.
        reference: Key of the reference; errors compare if they share it.
        distance: Distance to the requested image.
        top1: Share of images whose nearest training image has the prompt's name.
        clip_score: CLIP score on the user's weights.
        frechet: Frechet distance to the user's images.
        metrics: Metrics of plug-ins, by name.
        ranks: Number of ranks.
        threads: Threads per rank.
        scaling: Speed-up against the one-rank run with otherwise the same configuration.
        cache: Evaluations that the run's cache saved.
        equal_latency: Run without a cache, in fewer steps, that takes no longer.
        comparison: Result of task=compare.
        provenance: Versions, hardware and engine.
        started: Time at which the run began, UTC, ISO 8601.
        commit: First digits of the commit, with a plus if the working tree differed from it.
        machine: Processor, instruction set and device.
        command: Overrides that may change a number, in alphabetical order.
        prompts: Distinct prompts.
        categories: Categories of its data set.
        images: Number of images of its data set.
        grid: Thumbnail of the image grid as a data URI.
        front: Objectives of a search in which no other trial beats this run, with their values.
    """

    label: str
    folder: str
    state: str
    error: str | None
    values: dict[str, Cell]
    notes: list[str]
    latency: Summary | None = None
    repeats_ms: list[float] = []
    step: Summary | None = None
    first_step: Summary | None = None
    stages: dict[str, float] = {}
    load: LoadSummary | None = None
    nfe: int | None = None
    memory_mib: float | None = None
    tflops: float | None = None
    ceiling_share: float | None = None
    comm_mb: float | None = None
    verdict: str | None = None
    declared: str | None = None
    pixel: Difference | None = None
    rounding: float | None = None
    reference: str | None = None
    distance: IntervalEstimate | None = None
    top1: Share | None = None
    clip_score: IntervalEstimate | None = None
    frechet: float | None = None
    metrics: dict[str, float] = {}
    ranks: int | None = None
    threads: int | None = None
    scaling: Scaling | None = None
    cache: CacheUse | None = None
    equal_latency: EqualLatencyBaseline | None = None
    comparison: Comparison | None = None
    provenance: dict[str, Cell] = {}
    started: str | None = None
    commit: str | None = None
    machine: str | None = None
    command: str | None = None
    prompts: list[str] = []
    grid: str | None = None
    categories: list[CategoryRow] = []
    images: int | None = None
    front: str | None = None


class ReportTable(msgspec.Struct, frozen=True):
    """The content of a page.

    Attributes:
        keys: The configuration keys that differ between the runs.
        rows: One row per run.
    """

    keys: list[str]
    rows: list[ReportRow]


@dataclass(frozen=True)
class StoredRun:
    """The content of a run's folder.

    Attributes:
        folder: The run's folder.
        status: Status of the run, with errors of reading in its message.
        record: The record, if the run left one.
        comparison: The comparison, if the run is one.
        config: Values of the resolved configuration by dotted key.
    """

    folder: Path
    status: Status
    record: Record | None
    comparison: Comparison | None
    config: dict[str, Cell]


def read_table(root: Path) -> ReportTable:
    """Read every run below a folder, in the order of the folders.

    Args:
        root: Folder with run folders at any depth.

    Returns:
        The keys that differ, and one row per run.
    """
    folders = sorted({file.parent for name in FILES for file in root.rglob(name)})
    runs = merge_runs([read_run(folder) for folder in folders])
    folders = [run.folder for run in runs]
    overridden = {o.partition("=")[0].lstrip("+") for run in runs if run.record for o in run.record.overrides}
    keys = varying_keys([run.config for run in runs if run.config], overridden)
    names = [folder.relative_to(root).as_posix() for folder in folders]
    records = {index: run.record for index, run in enumerate(runs) if run.record is not None and run.record.repeats}
    scaling, baselines = scalings(folders, records), equal_latency_baselines(records)
    named = run_labels([run.config for run in runs], keys, names)
    size = SMALL_THUMBNAIL if len(runs) >= MANY else THUMBNAIL
    rows = [_row(run, keys, named[k], names[k], scaling.get(k), size) for k, run in enumerate(runs)]
    best = search_fronts(folders)
    return ReportTable(
        keys,
        [
            msgspec.structs.replace(row, equal_latency=baselines.get(k), front=best.get(folders[k]))
            for k, row in enumerate(rows)
        ],
    )


def search_fronts(folders: Sequence[Path]) -> dict[Path, str]:
    """Return the objectives of each run that is on the front of the search which started it.

    Args:
        folders: The runs' folders.

    Returns:
        Names and values, such as `latency_ms 12.5, error 0.02`.
    """
    found = {}
    for sweep in {folder.parent for folder in folders}:
        search = read_search(sweep)
        if search is not None:
            for trial in search.best:
                values = zip(search.objectives, trial.measured.values or [], strict=True)
                found[sweep / trial.measured.folder] = ", ".join(f"{name} {value:.4g}" for name, value in values)
    return found


def merge_runs(runs: list[StoredRun]) -> list[StoredRun]:
    """Return the runs with the shards of each data set as one, in the place of its first shard.

    Args:
        runs: The runs.

    Returns:
        The runs; shards of which one is missing or failed stay rows of their own.
    """
    ended_well = {run.folder: run.record for run in runs if run.record is not None and run.status.state == "ok"}
    try:
        merged = {each.folders[0]: each for each in merge_complete(ended_well)}
    except RunFolderError:
        return runs  # a row for every shard, whose files cannot be read together
    others = {folder for each in merged.values() for folder in each.folders[1:]}
    return [
        replace(run, record=merged[run.folder].record, config=cells(without_shard(merged[run.folder].record.config)))
        if run.folder in merged
        else run
        for run in runs
        if run.folder not in others
    ]


def without_shard(config: dict[str, Any]) -> dict[str, object]:
    """Return a configuration without the number of its shard, which merged shards do not share."""
    return {**config, "dataset": {key: value for key, value in config["dataset"].items() if key != "shard"}}


def read_run(folder: Path) -> StoredRun:
    """Read a run's folder; what cannot be read is added to the error of its status.

    Args:
        folder: The run's folder.

    Returns:
        The content of the folder.
    """
    status, record, comparison, errors = read_status(folder), None, None, []
    try:
        record = read_record(folder)
    except RunFolderError as error:
        errors.append(str(error))
    try:
        comparison = read_comparison(folder)
    except RunFolderError as error:
        errors.append(str(error))
    config: dict[str, Cell] = {}
    try:
        config = cells(record.config if record is not None else _declared(folder))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        errors.append(f"config.yaml: {' '.join(str(error).split())}")
    message = "; ".join([*([status.error] if status.error else []), *errors])
    return StoredRun(folder, Status(status.state, message or None), record, comparison, config)


def _declared(folder: Path) -> dict[str, object]:
    """Return the configuration of a run without a record; empty if the run was refused before it was resolved."""
    file = folder / "config.yaml"
    found = yaml.safe_load(file.read_text()) if file.exists() else {}
    return found if isinstance(found, dict) else {}


def _row(
    run: StoredRun, keys: list[str], label: str, folder: str, scaling: Scaling | None, size: tuple[int, int]
) -> ReportRow:
    values = {key: run.config[key] for key in keys if key in run.config}
    grid, notes = thumbnail(run.folder / "grid.png", size)
    if run.comparison is not None:
        notes = [*run.comparison.notes, *notes]
    plain = ReportRow(
        label, folder, run.status.state, run.status.error, values, notes, comparison=run.comparison, grid=grid
    )
    return plain if run.record is None else _with_record(plain, run.record, scaling)


def _with_record(plain: ReportRow, record: Record, scaling: Scaling | None) -> ReportRow:
    """Add the numbers of a record to a row."""
    fidelity, quality, pretrained = record.fidelity, record.quality, record.pretrained
    git = record.provenance.git
    own = msgspec.to_builtins(record.provenance).items()
    provenance = {
        **{key: value for key, value in own if key not in OF_ONE_RUN},
        "engine": msgspec.to_builtins(record.engine),
    }
    return msgspec.structs.replace(
        plain if record.summary is None else _with_times(plain, record.summary),
        repeats_ms=[repeat.total_duration_ms for repeat in record.repeats],
        notes=[*record.notes, *plain.notes],
        load=record.load,
        verdict=None if fidelity is None else fidelity.verdict,
        declared=None if fidelity is None else fidelity.method_class,
        pixel=None if fidelity is None else fidelity.pixel,
        rounding=None if fidelity is None else rounding_bound(fidelity.floor_pixel),
        reference=None if fidelity is None else fidelity.reference,
        distance=None if quality is None else quality.distance,
        top1=None if quality is None else quality.top1,
        clip_score=None if pretrained is None else pretrained.clip_score,
        frechet=None if pretrained is None or pretrained.frechet is None else pretrained.frechet.value,
        metrics=record.metrics,
        ranks=record.provenance.world_size,
        threads=record.provenance.threads_per_rank,
        scaling=scaling,
        provenance={**cells(flatten(provenance)), "attention.resolved": record.attention.resolved},
        started=record.provenance.started or None,
        commit=None if git is None else git.commit[:12] + "+" * git.dirty,
        machine=" ".join(part for part in record.provenance.machine if part),
        command=" ".join(sorted(o for o in record.overrides if not o.lstrip("+").startswith(NOT_MEASURED))),
        prompts=list(dict.fromkeys(sample.prompt for sample in record.samples)),
        categories=[] if record.dataset is None else record.dataset.categories,
        images=None if record.dataset is None else record.dataset.images,
    )


def _with_times(plain: ReportRow, summary: Statistics) -> ReportRow:
    """Add the times of one request to a row."""
    reached, ceiling = summary.achieved_tflops, summary.ceiling_tflops
    return msgspec.structs.replace(
        plain,
        latency=summary.latency_ms,
        step=summary.step_ms,
        first_step=summary.first_step_ms,
        stages={name: stage.median for name, stage in summary.stage_ms.items()},
        nfe=summary.nfe,
        cache=summary.cache,
        memory_mib=summary.peak_memory_mib_max,
        tflops=reached,
        ceiling_share=reached / ceiling if reached is not None and ceiling else None,
        comm_mb=total_sent_bytes(summary.comm) / 1e6,
    )


def thumbnail(path: Path, size: tuple[int, int] = THUMBNAIL) -> tuple[str | None, list[str]]:
    """Shrink an image to a data URI.

    Args:
        path: Image file.
        size: Largest width and height, pixels.

    Returns:
        The data URI, or None if there is no readable file; and a note if the file cannot be read.
    """
    from PIL import Image

    if not path.exists():
        return None, []
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return None, [f"{path.name} cannot be shown: {type(error).__name__}"]
    small.thumbnail(size)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=WEBP_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}", []
