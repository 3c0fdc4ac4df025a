"""Numbers of a record as flat keys of a wandb run's summary."""

from __future__ import annotations

from datetime import datetime

import msgspec

from harness.messages import total_sent_bytes
from harness.metrics.fidelity import Fidelity
from harness.metrics.intervals import IntervalEstimate, Share
from harness.metrics.load import LoadSummary
from harness.metrics.pretrained import PretrainedScores
from harness.metrics.quality import Quality
from harness.records.provenance import Provenance
from harness.records.record import Record, Statistics


def record_scalars(record: Record) -> dict[str, float | str | bool]:
    """Return the statistics, errors and scores of a record."""
    summary = record.statistics
    return {
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
        **{f"stage_ms_median/{name}": row.median for name, row in summary.stage_ms.items()},
        **interval_scalars("latency_ms", summary.latency_ms.ci95),
        **flops_scalars(summary),
        **fidelity_scalars(record.fidelity),
        **quality_scalars(record.quality),
        **pretrained_scalars(record.pretrained),
        **{f"metric_{name}": value for name, value in record.metrics.items()},
    }


def time_scalars(provenance: Provenance) -> dict[str, float | str]:
    """Return when the measured run began and ended, and its length: wandb's own times are those of the logging."""
    if not provenance.started:
        return {}
    began, ended = (datetime.fromisoformat(text) for text in (provenance.started, provenance.ended))
    length_s = (ended - began).total_seconds()
    return {"started": provenance.started, "ended": provenance.ended, "duration_s": length_s}


def end_timestamp(provenance: Provenance) -> float | None:
    """Return when the measured run ended, s since 1970; None if the record does not say."""
    return datetime.fromisoformat(provenance.ended).timestamp() if provenance.ended else None


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
