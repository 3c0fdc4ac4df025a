"""Weights & Biases as a mirror of the record, written when a run has ended: README.md in this folder has what it gets.

Nothing here is called in a timed region.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
from rich.console import Console

from harness.config.schema import WandbConfig, WandbMode
from harness.loggers.artifacts import log_record_files, log_samples
from harness.loggers.connection import server, server_url
from harness.loggers.declared import own_tags, record_config, used_config
from harness.loggers.project import api_key, check_project
from harness.loggers.run_names import folder_title, project_name, shorten, wandb_id
from harness.loggers.scalars import end_timestamp, load_scalars, record_scalars, time_scalars
from harness.loggers.series import (
    load_series,
    log_series,
    pair_series,
    read_requests,
    repeat_series,
    step_series,
)
from harness.metrics.load import LoadSummary
from harness.records.comparison import Comparison
from harness.records.provenance import version
from harness.records.record import CategoryRow, Record, Status, read_record

if TYPE_CHECKING:
    import wandb

MISSING = (
    "wandb is not installed, so nothing is mirrored: pip install 'triptych[wandb]', or use logger.wandb.mode=disabled"
)
INIT_TIMEOUT_S = 10.0  # after which wandb gives up opening a run, where the server answered a moment ago
FINISH_TIMEOUT_S = 300.0  # after which wandb leaves the rest of an upload on disk
MAX_VIDEOS = 16  # videos of one run that are mirrored; the rest are on disk


def resolve_mode(mode: WandbMode) -> str:
    """Return online, offline or disabled.

    `auto` is disabled if wandb is not installed. Otherwise it is WANDB_MODE if set, else online only with an API key.
    """
    if mode is not WandbMode.auto:
        return mode.name
    if version("wandb") is None:
        return "disabled"
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    return "online" if logged_in() else "offline"


def connected_mode(mode: WandbMode) -> str:
    """Return the mode in which runs are logged: offline in place of online if the server does not answer."""
    resolved = resolve_mode(mode)
    return "offline" if resolved == "online" and server(server_url()).offline_note() is not None else resolved


def mode_notes(mode: WandbMode) -> list[str]:
    """Return what a record says of the mode: a note if auto finds no wandb, or if the server does not answer."""
    if mode is WandbMode.auto and version("wandb") is None:
        return [MISSING]
    note = server(server_url()).offline_note() if resolve_mode(mode) == "online" else None
    return [] if note is None else [note]


def logged_in() -> bool:
    """Return whether there is an API key."""
    return api_key() is not None


def check_connection(config: WandbConfig) -> None:
    """Refuse a run that is logged online to somebody whom the server does not know, before a process starts.

    Raises:
        ConfigError: One line says what to change.
    """
    if connected_mode(config.mode) == "online":
        check_project(config, project_name(config))


def log_run(config: WandbConfig, record: Record, folder: Path, job_type: str, status: Status) -> None:
    """Write one finished run, after all timed work.

    Args:
        config: The `logger.wandb` group.
        record: The record to mirror.
        folder: The run's folder; it holds `wandb/`, `grid.png` and the samples.
        job_type: The task.
        status: How the run ended: it may have failed with a record.
    """
    mode = connected_mode(config.mode)
    if mode == "disabled":
        return
    with _opened(config, mode, folder, job_type, record_config(record), status) as run:
        for series in (repeat_series(record), step_series(record)):
            log_series(run, series, end_timestamp(record.provenance))
        run.log(_tables(record) | _media(record, folder))
        log_record_files(run, folder, {"fingerprint": record.fingerprint})
        log_samples(run, folder, record.samples)
        run.summary.update(_outcome(status, record) | record_scalars(record))


def _outcome(status: Status, record: Record | None = None) -> dict[str, object]:
    """Return the summary of how a run ended; it replaces that of an earlier attempt in the same folder."""
    outcome: dict[str, object] = {"state": status.state, "error": status.error}
    if record is None:
        return outcome
    return outcome | {"fingerprint": record.fingerprint} | time_scalars(record.provenance)


def _tables(record: Record) -> dict[str, wandb.Table]:
    """Return stages, steps, ranks, traffic and categories as tables."""
    import wandb

    summary = record.statistics
    stages = wandb.Table(columns=["stage", "median_ms", "low_ms", "high_ms", "interval"])
    for name, row in summary.stage_ms.items():
        stages.add_data(name, row.median, *row.spread, row.spread_name)
    steps = wandb.Table(columns=["repeat", "step", "duration_ms"])
    for number, repeat in enumerate(record.repeats):
        for step in repeat.denoise_steps_ms:
            steps.add_data(number, step.step, step.duration_ms)
    ranks = wandb.Table(columns=["rank", "peak_memory_mib"])
    for rank, peak in enumerate(summary.peak_memory_mib):
        ranks.add_data(rank, peak)
    traffic = wandb.Table(columns=["stage", "kind", "bytes", "calls", "exposed_ms"])
    for name, kinds in summary.comm.items():
        for kind, sent in kinds.items():
            traffic.add_data(name, kind, sent.bytes, sent.calls, sent.exposed_ms)
    categories = {} if record.dataset is None else {"categories": category_table(record.dataset.categories)}
    return {"stages": stages, "steps": steps, "ranks": ranks, "comm": traffic, **categories}


def _media(record: Record, folder: Path) -> dict[str, object]:
    """Return the grid and the first videos."""
    import wandb

    images = {"grid": wandb.Image(str(folder / "grid.png"))} if (folder / "grid.png").exists() else {}
    rows = [row for row in record.samples if row.path.endswith(".mp4")][:MAX_VIDEOS]
    videos = {"videos": [wandb.Video(str(folder / row.path), caption=row.prompt) for row in rows]} if rows else {}
    return {**images, **videos}


def category_table(categories: Sequence[CategoryRow]) -> wandb.Table:
    """Return the categories of a data set as a table; what was not scored is empty."""
    import wandb

    table = wandb.Table(columns=["category", "images", "image_ms", "top1", "distance", "clip_score"])
    for row in categories:
        scores = (row.top1, row.distance, row.clip_score)
        table.add_data(row.name, row.images, row.duration_ms.median, *(None if s is None else s.value for s in scores))
    return table


def log_load(config: WandbConfig, record: Record, load: LoadSummary, folder: Path, status: Status) -> None:
    """Write one finished load.

    Args:
        config: The `logger.wandb` group.
        record: The record to mirror.
        load: What its clients measured.
        folder: The run's folder; it holds `wandb/` and the requests.
        status: How the run ended: requests may have no answer.
    """
    mode = connected_mode(config.mode)
    if mode == "disabled":
        return
    import wandb

    with _opened(config, mode, folder, "load", record_config(record), status) as run:
        series = load_series(read_requests(folder), load.elapsed_s)
        log_series(run, series, end_timestamp(record.provenance))
        table = wandb.Table(columns=["measured", "p50_ms", "p90_ms", "p99_ms", "mean_ms", "n"])
        for name, row in (("latency", load.latency_ms), ("queue", load.queue_ms), ("late", load.late_ms)):
            if row is not None:
                table.add_data(name, row.p50, row.p90, row.p99, row.mean, row.n)
        run.log({"percentiles": table})
        log_record_files(run, folder, {"fingerprint": record.fingerprint})
        run.summary.update(_outcome(status, record) | load_scalars(load))


def log_comparison(
    config: WandbConfig, comparison: Comparison, folder: Path, declared: Mapping[str, object], status: Status
) -> None:
    """Write one finished comparison, after all timed work.

    Args:
        config: The `logger.wandb` group.
        comparison: The comparison to mirror.
        folder: The comparison's folder; it holds `wandb/`, and the two runs in `a` and `b`.
        declared: The configuration that both runs share.
        status: How the comparison ended.
    """
    mode = connected_mode(config.mode)
    if mode == "disabled":
        return
    import wandb

    found = {name: read_record(folder / name) for name in ("a", "b")}
    records = {name: record for name, record in found.items() if record is not None}
    baseline = records.get("a")
    origin = {} if baseline is None else {"provenance": msgspec.to_builtins(baseline.provenance)}
    sides = {"a": comparison.a, "b": comparison.b, "ranks": list(comparison.ranks)}
    declared = {**used_config(declared), **sides, **origin}
    with _opened(config, mode, folder, "compare", declared, status) as run:
        log_series(run, pair_series(records), None if baseline is None else end_timestamp(baseline.provenance))
        table = wandb.Table(columns=["timed", "a_ms", "b_ms", "ratio", "low", "high", "detectable"])
        for name, row in comparison.ratios.items():
            table.add_data(name, row.a_ms, row.b_ms, row.ratio, *row.interval, row.detectable)
            run.summary.update({f"ratio_{name}": row.ratio, f"differs_{name}": row.differs})
        run.log({"ratios": table})
        log_record_files(run, folder)
        run.summary.update(_outcome(status, baseline))
        if comparison.output is not None:
            run.summary.update({"rel_l2": comparison.output.rel_l2, "identical": comparison.output.identical})


def log_failure(
    config: WandbConfig,
    declared: Mapping[str, object],
    folder: Path,
    job_type: str,
    status: Status,
    owns_folder: bool = True,
) -> None:
    """Write a run that failed, so that a sweep's group shows it too.

    Args:
        config: The `logger.wandb` group.
        declared: The configuration, as far as it is known.
        folder: The folder that holds `wandb/`.
        job_type: The task.
        status: The status that names the error.
        owns_folder: Whether the folder is this run's, so that a later attempt there goes on with the same wandb run.
    """
    mode = connected_mode(config.mode)
    if mode == "disabled":
        return
    with _opened(config, mode, folder, job_type, used_config(declared), status, owns_folder) as run:
        run.summary.update(_outcome(status))
        if owns_folder:
            log_record_files(run, folder)


@contextmanager
def _opened(
    config: WandbConfig,
    mode: str,
    folder: Path,
    job_type: str,
    declared: Mapping[str, object],
    status: Status,
    owns_folder: bool = True,
) -> Iterator[wandb.Run]:
    """Open the wandb run of a folder, and end it as the run ended; an error of wandb in the block fails it too."""
    run = open_run(config, mode, folder, job_type, declared, run_id=wandb_id(folder) if owns_folder else None)
    exit_code = 1
    try:
        yield run
        exit_code = 0 if status.state == "ok" else 1
    finally:
        run.finish(exit_code=exit_code)


def open_run(
    config: WandbConfig,
    mode: str,
    folder: Path,
    job_type: str,
    declared: Mapping[str, object],
    name: str | None = None,
    run_id: str | None = None,
) -> wandb.Run:
    """Open a wandb run, offline if the server does not take it in time; so are then all later ones of this process.

    Args:
        config: The `logger.wandb` group.
        mode: The mode, online or offline.
        folder: The folder that holds `wandb/`.
        job_type: The task.
        declared: What wandb shows as the configuration.
        name: The run's name; None is the folder's.
        run_id: The id of a run that is resumed if it exists.

    Returns:
        The open run.
    """
    import wandb

    arguments = (config, folder, job_type, declared, name, run_id)
    if mode == "online":
        try:
            run = _init("online", *arguments)
        except wandb.errors.CommError as error:
            server(server_url()).give_up(" ".join(str(error).split()) or type(error).__name__)
            wandb.teardown()  # the run that was not opened would keep its id
        else:
            if config.group is None and run.url is not None:
                Console(stderr=True).print(f"wandb: {run.url}", highlight=False, markup=False, soft_wrap=True)
            return run
    return _init("offline", *arguments)


def _init(
    mode: Literal["online", "offline"],
    config: WandbConfig,
    folder: Path,
    job_type: str,
    declared: Mapping[str, object],
    name: str | None,
    run_id: str | None,
) -> wandb.Run:
    """Open a run. A set variable of wandb's wins over a default; `wandb agent` gives id, project and entity itself."""
    import wandb

    given = os.environ.get
    by_agent = given("WANDB_SWEEP_ID") is not None
    own_id = None if by_agent or given("WANDB_RUN_ID") else run_id
    return wandb.init(
        mode=mode,
        entity=None if by_agent else config.entity,
        project=None if by_agent else project_name(config),
        group=config.group,
        name=config.name or given("WANDB_NAME") or shorten(name or folder_title(folder)),
        id=own_id,
        resume="allow" if own_id is not None else None,
        job_type=given("WANDB_JOB_TYPE") or job_type,
        tags=own_tags(declared) or None,
        notes=str(declared["notes"]) if declared.get("notes") else None,
        dir=folder,
        config=dict(declared),
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            git_commit=_commit(declared),
            x_disable_stats=True,
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
        ),
        reinit="finish_previous",
    )


def _commit(declared: Mapping[str, object]) -> str | None:
    """Return the commit that a configuration's provenance names."""
    origin = declared.get("provenance")
    git = origin.get("git") if isinstance(origin, Mapping) else None
    return None if git is None else str(git["commit"])
