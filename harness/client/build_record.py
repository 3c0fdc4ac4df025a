"""From answers to a record: the slowest rank's times, every rank's memory, statistics over repeats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from safetensors import SafetensorError

from harness.config.cache import IDENTITY, NONE, CacheConfig
from harness.config.schema import ModelConfig, QualityConfig, RunConfig
from harness.messages import Array, EngineInfo, GenerationResult, OperatorTime, RankReport, Skips, sent_bytes
from harness.metrics import pretrained
from harness.metrics.gallery import FILE, Gallery, GalleryError
from harness.metrics.quality import Quality, score
from harness.metrics.summary import Summary, summarize
from harness.parallel.mesh import Place, degrees
from harness.records.media import to_uint8
from harness.records.provenance import provenance
from harness.records.record import (
    SCHEMA,
    Attention,
    CacheUse,
    Engine,
    FirstCall,
    Record,
    Repeat,
    Statistics,
    fingerprint,
)
from harness.resolve.checkpoint import locate
from harness.resolve.compose import to_dict
from harness.resolve.engines_table import CACHE_DIT, engine_version
from harness.resolve.trained import trained_denoiser
from models import hub

OPERATORS = 20  # that a profile names


def measured(result: GenerationResult, client_ms: float) -> Repeat:
    """One answer as a repeat: stages and steps of the slowest rank, memory of the largest."""
    slowest = max(result.ranks, key=_total_ms)
    largest = max(result.ranks, key=lambda report: report.peak_memory_mib)
    return Repeat(
        total_duration_ms=result.total_duration_ms,
        client_duration_ms=client_ms,
        steps=slowest.stages,
        denoise_steps_ms=slowest.denoise_steps_ms,
        networks_ms=slowest.networks_ms,
        memory_checkpoints=largest.memory_checkpoints,
    )


def overhead_share(repeat: Repeat) -> float:
    """The share of what a client waited for that was no network's forward (text encoder, denoiser, VAE)."""
    return 1 - sum(repeat.networks_ms.values()) / repeat.client_duration_ms


def statistics(
    repeats: Sequence[Repeat],
    results: Sequence[GenerationResult],
    batch_size: int,
    replica_size: int = 1,
    counted: GenerationResult | None = None,
    ceilings: Sequence[float] = (),
    even: bool = True,
) -> Statistics:
    """The row's numbers over all repeats of one request.

    Args:
        repeats: at least one.
        results: the answers.
        batch_size: pictures a forward.
        replica_size: ranks a picture.
        counted: an answer whose operations were counted.
        ceilings: of every rank, TFLOP/s.
        even: every step does the same operations, so that a median step is a typical one.
    """
    last = results[-1]
    peaks = [max(peak) for peak in zip(*([rank.peak_memory_mib for rank in r.ranks] for r in results), strict=True)]
    stages = [stage.name for stage in repeats[0].steps]
    durations = {
        name: [next(stage.duration_ms for stage in repeat.steps if stage.name == name) for repeat in repeats]
        for name in stages
    }
    latency = summarize([repeat.total_duration_ms for repeat in repeats])
    evaluations = sum(report.network_evaluations.get("denoiser", 0) for report in last.ranks[::replica_size])
    spared = cache_use([skips for report in last.ranks[::replica_size] for skips in report.skips])
    micro_batches = math.ceil(len(last.samples) / batch_size)
    step = summarize([step.duration_ms for repeat in repeats for step in repeat.denoise_steps_ms])
    flops = None if counted is None else flops_per_step(counted, replica_size)
    return Statistics(
        latency_ms=latency,
        step_ms=step,
        stage_ms={name: summarize(values) for name, values in durations.items()},
        overhead_share=summarize([overhead_share(repeat) for repeat in repeats]),
        throughput_per_s=1e3 * len(last.samples) / latency.median,
        nfe=evaluations // micro_batches if spared is None else round(spared.computed),
        peak_memory_mib=peaks,
        peak_memory_mib_max=max(peaks),
        flops_per_step=flops,
        achieved_tflops=None if flops is None else flops / (step.median if even else step.mean) / 1e9,
        ceiling_tflops=sum(ceilings[:replica_size]) or None,
        comm=max((report.comm for report in last.ranks), key=sent_bytes),
        cache=spared,
        energy_j=energy(results),
    )


def energy(results: Sequence[GenerationResult]) -> Summary | None:
    """Of a request, over all ranks that report it, J; None where none does."""
    told = [[report.energy_j for report in result.ranks if report.energy_j is not None] for result in results]
    return summarize([sum(parts) for parts in told]) if all(told) else None


def cache_use(skips: Sequence[Skips]) -> CacheUse | None:
    """Means over pictures; None where no cache was used."""
    if not skips:
        return None
    return CacheUse(
        evaluations=fmean(s.evaluations for s in skips),
        computed=fmean(s.evaluations - len(s.skipped) for s in skips),
        branches=fmean(s.branches for s in skips),
        branches_computed=fmean(s.branches_computed for s in skips),
    )


def cache_notes(config: CacheConfig, model: str, skips: Sequence[Skips]) -> list[str]:
    """What a cache did, in words, of all pictures."""
    use = cache_use(skips)
    if use is None:
        return []
    said = f"cache={config.name} computed {use.branches_computed:.4g} of {use.branches:.4g} branches a picture"
    if use.branches == use.branches_computed:
        return [f"{said}: it spared nothing"]
    if use.computed < use.evaluations:
        first = ", ".join(map(str, skips[0].skipped)) or "none"
        said += (
            f", in {use.computed:.4g} of {use.evaluations:.4g} evaluations; nfe does not count the others, of the "
            f"first picture {first}"
        )
    identity = config.coefficients == list(IDENTITY)
    of_model = f"TeaCache's polynomial is the identity, for none is published for model={model}"
    return [said, of_model] if identity else [said]


def flops_per_step(counted: GenerationResult, replica_size: int) -> float:
    """Operations of one solver step of one micro-batch, over the ranks of the first replica."""
    replica = counted.ranks[:replica_size]
    return sum(report.flops["denoiser"] for report in replica) / len(replica[0].denoise_steps_ms)


def operators(profiled: GenerationResult) -> dict[str, list[OperatorTime]]:
    """Of each network, the operators of the slowest rank: one row each, the slowest first, 20 and all others together,
    without those that took no time.
    """
    slowest = max(profiled.ranks, key=_total_ms)
    return {name: _summed(parts) for name, parts in slowest.operators.items()}


def _summed(parts: Sequence[OperatorTime]) -> list[OperatorTime]:
    by_name: dict[str, OperatorTime] = {}
    for part in parts:
        known = by_name.get(part.name, OperatorTime(part.name, 0, 0.0))
        by_name[part.name] = OperatorTime(part.name, known.calls + part.calls, known.self_ms + part.self_ms)
    rows = sorted((row for row in by_name.values() if row.self_ms > 0), key=lambda row: -row.self_ms)
    rest = rows[OPERATORS:]
    others = OperatorTime("others", sum(row.calls for row in rest), sum(row.self_ms for row in rest))
    return [*rows[:OPERATORS], *([others] if rest else [])]


def quality(folder: Path, pixels: Sequence[Array], prompts: Sequence[str]) -> tuple[Quality | None, list[str]]:
    """The score of one answer's pictures, and why there is none.

    Args:
        folder: the checkpoint, whose `gallery.safetensors` is what its pictures are compared with.
        pixels: pictures (3, height, width), float32 in [0, 1]; or videos, which nothing here scores.
        prompts: of each.
    """
    if pixels[0].ndim == 4:
        return None, ["quality is not scored: it is measured on pictures, and these are videos"]
    file = folder / FILE
    if not file.is_file():
        return None, [f"quality is not scored: the checkpoint has no {FILE}"]
    try:
        found = score(Gallery.load(file), [to_uint8(picture) for picture in pixels], prompts)
    except GalleryError as error:
        return None, [f"quality is not scored: {error}"]
    if found is None:
        return None, [f"quality is not scored: no prompt is a name, or a name and a style, of {FILE}"]
    return found, []


def pretrained_quality(
    config: QualityConfig, pixels: Sequence[Array], prompts: Sequence[str]
) -> tuple[pretrained.Pretrained | None, list[str]]:
    """The scores on the user's own weights, and why there are none where they were asked for."""
    if pixels[0].ndim == 4:
        asked = config.clip is not None or config.features is not None
        return None, ["quality.clip and quality.features score pictures, and these are videos"] if asked else []
    try:
        return pretrained.score(config, [to_uint8(picture) for picture in pixels], prompts), []
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        return None, [f"quality.clip and quality.features are not scored: {' '.join(str(error).split())}"]


def fetched(model: ModelConfig, folder: Path) -> list[str]:
    """Which commit a hub name stood for, where the checkpoint has one."""
    found = hub.commit(folder)
    return [] if model.path is None or found is None else [f"model.path={model.path} is commit {found}, in {folder}"]


def build_record(
    config: RunConfig,
    overrides: list[str],
    info: EngineInfo,
    environment: dict[str, str],
    first: FirstCall,
    repeats: list[Repeat],
    results: list[GenerationResult],
    pixels: Sequence[Array],
    notes: list[str],
    counted: GenerationResult | None = None,
    profiled: GenerationResult | None = None,
) -> Record:
    """The record of one run, `pixels` being the last answer's pictures; their rows are added when they are saved."""
    declared = to_dict(config)
    prompts = [sample.prompt for sample in results[-1].samples]
    folder = locate(config.model, trained_denoiser(config).weights).folder
    scored, reasons = quality(folder, pixels, prompts)
    extra, more = pretrained_quality(config.quality, pixels, prompts)
    said = dict.fromkeys(
        [
            *notes,
            *fetched(config.model, folder),
            *(note for result in results for report in result.ranks for note in report.notes),
            *cache_notes(config.cache, config.model.name, [s for report in results[-1].ranks for s in report.skips]),
            *reasons,
            *more,
        ]
    )
    return Record(
        schema=SCHEMA,
        fingerprint=fingerprint(declared),
        overrides=overrides,
        config=declared,
        provenance=provenance(info, environment),
        attention=Attention(config.attention.backend, info.attention),
        first_call=first,
        repeats=repeats,
        summary=statistics(
            repeats,
            results,
            config.request.batch_size,
            Place(0, degrees(config.parallel)).replica_size,
            counted,
            info.ceiling_tflops,
            even=config.engine.name != CACHE_DIT and config.cache.name == NONE,
        ),
        samples=[],
        notes=list(said),
        quality=scored,
        pretrained=extra,
        loaded=info.loaded,
        engine=Engine(config.engine.name, engine_version(config.engine.name)),
        profile={} if profiled is None else operators(profiled),
    )


def _total_ms(report: RankReport) -> float:
    return sum(stage.duration_ms for stage in report.stages)
