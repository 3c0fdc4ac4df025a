"""A tree of runs as the rows of a page: every run is one, whether it ended well, badly or cannot be read."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import msgspec
import yaml

from harness.messages import total_sent_bytes
from harness.metrics.difference import Difference
from harness.metrics.intervals import Estimate, Share
from harness.metrics.load import LoadSummary
from harness.metrics.summary import Summary
from harness.records.comparison import Comparison, read_comparison
from harness.records.record import CacheUse, Record, RunFolderError, Statistics, Status, read_record, read_status
from harness.tasks.report.keys import Cell, cells, labels, varying
from harness.tasks.report.rivals import Rival, rivals
from harness.tasks.report.scaling import Scaling, scalings
from harness.tasks.report.sweep import flat

FILES = ("status.json", "record.json", "comparison.json")  # any of them makes a folder a run's
THUMBNAIL = (600, 900)  # pixels, at most
WEBP_QUALITY = 82


class Row(msgspec.Struct, frozen=True):
    """One run. Times are ms, memory MiB, traffic MB, shares in [0, 1]; null is what was not measured.

    values: of the keys that vary. stages: median ms by stage. ceiling_share: of a matrix product's TFLOP/s on the same
    ranks. load: what clients of task=load measured. pixel: error against the reference, with its `verdict`. scaling:
    against the one-rank run of the same everything else. cache: what it spared, with the `rival` of fewer steps. grid:
    the shrunk picture as a data URI.
    """

    label: str
    folder: str
    state: str
    error: str | None
    values: dict[str, Cell]
    notes: list[str]
    latency: Summary | None = None
    step: Summary | None = None
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
    distance: Estimate | None = None
    top1: Share | None = None
    ranks: int | None = None
    threads: int | None = None
    scaling: Scaling | None = None
    cache: CacheUse | None = None
    rival: Rival | None = None
    comparison: Comparison | None = None
    provenance: dict[str, Cell] = {}
    prompts: list[str] = []
    grid: str | None = None


class Table(msgspec.Struct, frozen=True):
    """What a page is made from: the keys that vary, and every row."""

    keys: list[str]
    rows: list[Row]


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    folder: Path
    status: Status
    record: Record | None
    comparison: Comparison | None
    config: dict[str, Cell]


def read_table(root: Path) -> Table:
    """Every run below a folder, in the order of their folders."""
    folders = sorted({file.parent for name in FILES for file in root.rglob(name)})
    runs = [read_run(folder) for folder in folders]
    overridden = {o.partition("=")[0].lstrip("+") for run in runs if run.record for o in run.record.overrides}
    keys = varying([run.config for run in runs if run.config], overridden)
    names = [folder.relative_to(root).as_posix() for folder in folders]
    records = {place: run.record for place, run in enumerate(runs) if run.record is not None and run.record.repeats}
    found, beside = scalings(folders, records), rivals(records)
    called = labels([run.config for run in runs], keys, names)
    rows = [_row(run, keys, called[k], names[k], found.get(k)) for k, run in enumerate(runs)]
    return Table(keys, [msgspec.structs.replace(row, rival=beside.get(k)) for k, row in enumerate(rows)])


def read_run(folder: Path) -> Run:
    """What is in a run's folder; what cannot be read is its error, after its own."""
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
    said = "; ".join([*([status.error] if status.error else []), *errors])
    return Run(folder, Status(status.state, said or None), record, comparison, config)


def _declared(folder: Path) -> dict[str, object]:
    """The configuration of a run that left no record; none of one that was refused before it was resolved."""
    file = folder / "config.yaml"
    found = yaml.safe_load(file.read_text()) if file.exists() else {}
    return found if isinstance(found, dict) else {}


def _row(run: Run, keys: list[str], label: str, folder: str, scaling: Scaling | None) -> Row:
    values = {key: run.config[key] for key in keys if key in run.config}
    grid, notes = thumbnail(run.folder / "grid.png")
    if run.comparison is not None:
        notes = [*run.comparison.notes, *notes]
    plain = Row(label, folder, run.status.state, run.status.error, values, notes, comparison=run.comparison, grid=grid)
    return plain if run.record is None else _measured(plain, run.record, scaling)


def _measured(plain: Row, record: Record, scaling: Scaling | None) -> Row:
    """A row with its record's numbers."""
    fidelity, quality = record.fidelity, record.quality
    origin = {**msgspec.to_builtins(record.provenance), "engine": msgspec.to_builtins(record.engine)}
    return msgspec.structs.replace(
        plain if record.summary is None else _timed(plain, record.summary),
        notes=[*record.notes, *plain.notes],
        load=record.load,
        verdict=None if fidelity is None else fidelity.verdict,
        declared=None if fidelity is None else fidelity.method_class,
        pixel=None if fidelity is None else fidelity.pixel,
        distance=None if quality is None else quality.distance,
        top1=None if quality is None else quality.top1,
        ranks=record.provenance.world_size,
        threads=record.provenance.threads_per_rank,
        scaling=scaling,
        provenance={**cells(flat(origin)), "attention.resolved": record.attention.resolved},
        prompts=list(dict.fromkeys(sample.prompt for sample in record.samples)),
    )


def _timed(plain: Row, summary: Statistics) -> Row:
    """A row with the times of one request."""
    reached, ceiling = summary.achieved_tflops, summary.ceiling_tflops
    return msgspec.structs.replace(
        plain,
        latency=summary.latency_ms,
        step=summary.step_ms,
        stages={name: stage.median for name, stage in summary.stage_ms.items()},
        nfe=summary.nfe,
        cache=summary.cache,
        memory_mib=summary.peak_memory_mib_max,
        tflops=reached,
        ceiling_share=reached / ceiling if reached is not None and ceiling else None,
        comm_mb=total_sent_bytes(summary.comm) / 1e6,
    )


def thumbnail(path: Path) -> tuple[str | None, list[str]]:
    """A picture shrunk to a data URI, and notes where it cannot be read; neither where there is none."""
    from PIL import Image

    if not path.exists():
        return None, []
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return None, [f"{path.name} cannot be shown: {type(error).__name__}"]
    small.thumbnail(THUMBNAIL)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=WEBP_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}", []
