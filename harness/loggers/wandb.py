"""Weights & Biases as a mirror of the record.

It gets the nested configuration, summary scalars, tables of stages and steps, memory, the grid and videos.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlparse

import msgspec

from harness.config.schema import WandbConfig, WandbMode
from harness.loggers.connection import server, server_url
from harness.messages import total_sent_bytes
from harness.metrics.fidelity import Fidelity
from harness.metrics.intervals import IntervalEstimate, Share
from harness.metrics.load import LoadSummary
from harness.metrics.pretrained import PretrainedScores
from harness.metrics.quality import Quality
from harness.records.comparison import Comparison
from harness.records.provenance import version
from harness.records.record import CategoryRow, Record, Statistics, Status

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
    """Return whether there is an API key, in the environment or in ~/.netrc, where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(server_url()).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators(host) is not None
    return False


def log_run(config: WandbConfig, record: Record, folder: Path, job_type: str, run_id: str | None = None) -> None:
    """Write one finished run, after all timed work.

    Args:
        config: The `logger.wandb` group.
        record: The record to mirror.
        folder: The run's folder; it holds `wandb/`, `grid.png` and the videos.
        job_type: The task.
        run_id: Id of the wandb run that has logged its images already.
    """
    mode = connected_mode(config.mode)
    if mode == "disabled":
        return
    import wandb

    with open_run(config, mode, folder, job_type, record.config, run_id=run_id) as run:
        for number, repeat in enumerate(record.repeats):
            networks = {f"networks_ms/{name}": value for name, value in repeat.networks_ms.items()}
            run.log({"repeat": number, "latency_ms": repeat.total_duration_ms, **networks})
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
        images = {"grid": wandb.Image(str(folder / "grid.png"))} if (folder / "grid.png").exists() else {}
        rows = [row for row in record.samples if row.path.endswith(".mp4")][:MAX_VIDEOS]
        videos = {"videos": [wandb.Video(str(folder / row.path), caption=row.prompt) for row in rows]} if rows else {}
        categories = {} if record.dataset is None else {"categories": category_table(record.dataset.categories)}
        run.log({"stages": stages, "steps": steps, "ranks": ranks, "comm": traffic, **images, **videos, **categories})
        run.summary.update(
            {
                "state": "ok",
                "fingerprint": record.fingerprint,
                "latency_ms_median": summary.latency_ms.median,
                "step_ms_median": summary.step_ms.median,
                "throughput_per_s": summary.throughput_per_s,
                "overhead_share_median": summary.overhead_share.median,
                "nfe": summary.nfe,
                "peak_memory_mib_max": summary.peak_memory_mib_max,
                "attention_resolved": record.attention.resolved,
                "engine": record.engine.name,
                "load_ms": record.first_call.load_ms,
                "comm_bytes": total_sent_bytes(summary.comm),
                "comm_exposed_ms": sum(sent.exposed_ms for kinds in summary.comm.values() for sent in kinds.values()),
            }
            | interval_scalars("latency_ms", summary.latency_ms.ci95)
            | flops_scalars(summary)
            | fidelity_scalars(record.fidelity)
            | quality_scalars(record.quality)
            | pretrained_scalars(record.pretrained)
            | {f"metric_{name}": value for name, value in record.metrics.items()}
        )


def category_table(categories: Sequence[CategoryRow]) -> wandb.Table:
    """Return the categories of a data set as a table; what was not scored is empty."""
    import wandb

    table = wandb.Table(columns=["category", "images", "image_ms", "top1", "distance", "clip_score"])
    for row in categories:
        scores = (row.top1, row.distance, row.clip_score)
        table.add_data(row.name, row.images, row.duration_ms.median, *(None if s is None else s.value for s in scores))
    return table


def log_load(config: WandbConfig, record: Record, load: LoadSummary, folder: Path) -> None:
    """Write one finished load."""
    mode = connected_mode(config.mode)
    if mode == "disabled":
        return
    import wandb

    with open_run(config, mode, folder, "load", record.config) as run:
        table = wandb.Table(columns=["measured", "p50_ms", "p90_ms", "p99_ms", "mean_ms", "n"])
        for name, row in (("latency", load.latency_ms), ("queue", load.queue_ms), ("late", load.late_ms)):
            if row is not None:
                table.add_data(name, row.p50, row.p90, row.p99, row.mean, row.n)
        run.log({"percentiles": table})
        run.summary.update({"state": "ok", "fingerprint": record.fingerprint} | load_scalars(load))


def load_scalars(load: LoadSummary) -> dict[str, float]:
    """Return what clients measured as flat summary keys: `throughput_per_s`, `latency_ms_p99`, `outcome_busy` ..."""
    scalars = {
        "offered_per_s": load.offered_per_s,
        "clients": load.clients,
        "sent": load.sent,
        "strays": load.strays,
        "throughput_per_s": load.throughput_per_s,
        "goodput_per_s": load.goodput_per_s,
        "evaluations": load.evaluations,
        "images_per_evaluation": load.images_per_evaluation,
    }
    if load.latency_ms is not None:
        row = load.latency_ms
        scalars |= {"latency_ms_p50": row.p50, "latency_ms_p90": row.p90, "latency_ms_p99": row.p99}
    scalars |= {f"outcome_{kind}": count for kind, count in load.outcomes.items()}
    scalars |= {f"slowdown_beside_{row.neighbours}": row.slowdown for row in load.neighbours}
    return {name: value for name, value in scalars.items() if value is not None}


def log_comparison(
    config: WandbConfig, comparison: Comparison, folder: Path, remarks: Mapping[str, object] = MappingProxyType({})
) -> None:
    """Write one finished comparison, after all timed work.

    Args:
        config: The `logger.wandb` group.
        comparison: The comparison to mirror.
        folder: The comparison's folder; it holds `wandb/`.
        remarks: The user's own keys: tags, notes and meta.
    """
    mode = connected_mode(config.mode)
    if mode == "disabled":
        return
    import wandb

    declared = {"a": comparison.a, "b": comparison.b, "ranks": list(comparison.ranks), **remarks}
    with open_run(config, mode, folder, "compare", declared) as run:
        table = wandb.Table(columns=["timed", "a_ms", "b_ms", "ratio", "low", "high", "detectable"])
        for name, row in comparison.ratios.items():
            table.add_data(name, row.a_ms, row.b_ms, row.ratio, *row.interval, row.detectable)
            run.summary.update({f"ratio_{name}": row.ratio, f"differs_{name}": row.differs})
        run.log({"ratios": table})
        run.summary.update({"state": "ok"})
        if comparison.output is not None:
            run.summary.update({"rel_l2": comparison.output.rel_l2, "identical": comparison.output.identical})


def interval_scalars(name: str, interval: tuple[float, float] | None) -> dict[str, float]:
    """Return the ends of an interval as flat summary keys; none if there were too few measurements for one."""
    return {} if interval is None else {f"{name}_ci95_low": interval[0], f"{name}_ci95_high": interval[1]}


def flops_scalars(summary: Statistics) -> dict[str, float]:
    """Return operations and rates as flat summary keys; none if they were not counted."""
    scalars = {name: getattr(summary, name) for name in ("flops_per_step", "achieved_tflops", "ceiling_tflops")}
    return {name: value for name, value in scalars.items() if value is not None}


def fidelity_scalars(row: Fidelity | None) -> dict[str, float | str | bool]:
    """Return the error against the reference as flat summary keys: `fidelity_verdict`, `fidelity_latent_rel_l2` ..."""
    if row is None:
        return {}
    scalars: dict[str, float | str | bool] = {
        "fidelity_verdict": row.verdict,
        "fidelity_method_class": row.method_class,
        "fidelity_floor_latent": row.floor_latent,
        "fidelity_floor_pixel": row.floor_pixel,
    }
    for name, error in (("latent", row.latent), ("pixel", row.pixel)):
        measured = msgspec.to_builtins(error).items()
        scalars |= {f"fidelity_{name}_{key}": value for key, value in measured if value is not None}
    return scalars


def quality_scalars(quality: Quality | None) -> dict[str, float]:
    """Return the scores as flat summary keys: `quality_top1`, `quality_top1_ci95_low`, ...; none if there are none."""
    if quality is None:
        return {}
    scalars: dict[str, float] = {"quality_scored": quality.scored, "quality_unscored": quality.unscored}
    parts: dict[str, Share | IntervalEstimate | None] = {
        "top1": quality.top1,
        "top5": quality.top5,
        "top1_style": quality.top1_style,
        "distance": quality.distance,
        "mmd2": quality.mmd2,
    }
    for name, measured in parts.items():
        if measured is not None:
            scalars[f"quality_{name}"] = measured.value
            scalars |= interval_scalars(f"quality_{name}", measured.ci95)
    return scalars


def pretrained_scalars(scores: PretrainedScores | None) -> dict[str, float]:
    """Return the scores on the user's weights as flat summary keys."""
    scalars: dict[str, float] = {}
    if scores is not None and scores.clip_score is not None:
        scalars["clip_score"] = scores.clip_score.value
        scalars |= interval_scalars("clip_score", scores.clip_score.ci95)
    if scores is not None and scores.frechet is not None:
        scalars |= {"frechet": scores.frechet.value, "frechet_real": scores.frechet.real}
    return scalars


def log_failure(
    config: WandbConfig,
    declared: Mapping[str, object],
    folder: Path,
    job_type: str,
    status: Status,
    name: str | None = None,
) -> None:
    """Write a run that failed, so that a sweep's group shows it too.

    Args:
        config: The `logger.wandb` group.
        declared: The configuration, as far as it is known.
        folder: The folder that holds `wandb/`.
        job_type: The task.
        status: The status that names the error.
        name: The run's name, if it is not the folder's.
    """
    mode = connected_mode(config.mode)
    if mode == "disabled":
        return
    run = open_run(config, mode, folder, job_type, declared, name)
    run.summary.update({"state": status.state, "error": status.error})
    run.finish(exit_code=1)


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
        declared: The configuration.
        name: The run's name; None is the folder's.
        run_id: The id of a run that is resumed if it exists.

    Returns:
        The open run.
    """
    import wandb

    arguments = (config, folder, job_type, declared, name, run_id)
    if mode == "online":
        try:
            return _init("online", *arguments)
        except wandb.errors.CommError as error:
            server(server_url()).give_up(" ".join(str(error).split()) or type(error).__name__)
    return _init("offline", *arguments)


def own_tags(declared: Mapping[str, object]) -> list[str]:
    """Return the tags of a configuration; none if it is known in part."""
    tags = declared.get("tags")
    return [str(tag) for tag in tags] if isinstance(tags, list) else []


def _init(
    mode: Literal["online", "offline"],
    config: WandbConfig,
    folder: Path,
    job_type: str,
    declared: Mapping[str, object],
    name: str | None,
    run_id: str | None,
) -> wandb.Run:
    import wandb

    return wandb.init(
        mode=mode,
        project=config.project,
        group=config.group,
        name=config.name or name or folder.name,
        id=run_id,
        resume="allow" if run_id is not None else None,
        job_type=job_type,
        tags=own_tags(declared),
        notes=str(declared["notes"]) if declared.get("notes") else None,
        dir=folder,
        config=dict(declared),
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            x_disable_stats=True,
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
        ),
        reinit="finish_previous",
    )
