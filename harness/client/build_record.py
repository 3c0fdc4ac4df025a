"""Build a run's record from its answers: the slowest rank's times, every rank's memory, statistics over repeats."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import msgspec
from safetensors import SafetensorError

from harness.config.cache import IDENTITY, NONE, CacheConfig
from harness.config.schema import ModelConfig, QualityConfig, RequestConfig, RunConfig
from harness.device.usage import MachineUsage, load_average, waited_share
from harness.messages import Array, CacheSkips, EngineInfo, GenerationResult, OperatorTime, RankReport, total_sent_bytes
from harness.metrics import own, pretrained
from harness.metrics.gallery import FILE, Gallery, GalleryError
from harness.metrics.quality import Quality, score
from harness.metrics.summary import Summary, summarize
from harness.records.media import to_uint8
from harness.records.provenance import Beginning, provenance
from harness.records.record import (
    BETWEEN_STAGES,
    SCHEMA,
    AttentionRow,
    CacheUse,
    EngineRow,
    FirstCall,
    MachineLoad,
    Record,
    Repeat,
    Statistics,
    TraceRow,
    fingerprint,
)
from harness.resolve.compose import to_dict
from harness.resolve.engines_table import CACHE_DIT, engine_version
from harness.resolve.run import ResolvedRun
from models import hub

BUSY_CORES, BUSY_SHARE = 0.25, 0.05  # processors, and share of all, that other processes may use without a note
PLANNED = "hardware"  # the group that describes the machine of task=plan, not the one of a run
STEAL_SHARE = 0.01  # share of steal time without a note
WAITED_SHARE = 0.1  # share of the ranks' time without a processor, without a note
OPERATORS = 20  # the number of operators that a profile lists by name


def make_repeat(
    result: GenerationResult, client_ms: float, watched: MachineUsage | None = None, hosts: int = 1
) -> Repeat:
    """Return one answer as a repeat: the stages and steps of the slowest rank, the memory of the largest.

    Args:
        result: the answer.
        client_ms: the time that the client waited, ms.
        watched: what the client's machine used in that time, if it was watched.
        hosts: the number of machines of the ranks.
    """
    slowest = max(result.ranks, key=_total_ms)
    largest = max(result.ranks, key=lambda report: report.peak_memory_mib)
    return Repeat(
        total_duration_ms=result.total_duration_ms,
        client_duration_ms=client_ms,
        steps=slowest.stages,
        denoise_steps_ms=slowest.denoise_steps_ms,
        networks_ms=slowest.networks_ms,
        memory_checkpoints=largest.memory_checkpoints,
        machine=None if watched is None else machine_load(result.ranks, watched, hosts),
    )


def trace_row(
    path: str, request: Repeat, ranks: Sequence[RankReport], repeats: Sequence[Repeat], snapshots: list[str]
) -> TraceRow:
    """Return what the record has of a traced request.

    Args:
        path: the name of the trace's file.
        request: the times of the traced request.
        ranks: the reports of its ranks.
        repeats: the repeats that were not traced, at least one.
        snapshots: the names of the files with histories of GPU memory.
    """
    traced_ms = sum(stage.duration_ms for stage in request.steps)
    plain_ms = median(sum(stage.duration_ms for stage in repeat.steps) for repeat in repeats)
    return TraceRow(path, request, max(ranks, key=_total_ms).rank, traced_ms / plain_ms - 1, snapshots)


def machine_load(ranks: Sequence[RankReport], watched: MachineUsage, hosts: int) -> MachineLoad | None:
    """Return how busy the processors were during one answer, or None if the ranks do not report their CPU time."""
    used_s = [report.cpu_s for report in ranks if report.cpu_s is not None]
    if len(used_s) < len(ranks):
        return None
    other_cores = steal_share = None
    if watched.busy_s is not None and hosts == 1:
        other_cores = max(0.0, watched.busy_s - sum(used_s) - watched.client_s) / watched.wall_s
    if watched.steal_s is not None:
        steal_share = watched.steal_s / watched.wall_s / (os.cpu_count() or 1)
    return MachineLoad(
        rank_cores=sum(used_s) / watched.wall_s,
        involuntary_switches=sum(report.involuntary_switches for report in ranks),
        other_cores=other_cores,
        steal_share=steal_share,
        load_average=load_average(),
        waited_share=waited_share([(report.cpu_s or 0.0, report.waited_s) for report in ranks]),
    )


def machine_notes(repeats: Sequence[Repeat]) -> list[str]:
    """Return notes that say so if the machine was busy with something else while repeats were measured.

    The means are over the time of all repeats, because the kernel counts in ticks of 10 ms.
    """
    loads = [(repeat.machine, repeat.client_duration_ms) for repeat in repeats if repeat.machine is not None]
    total_ms, cores, notes = sum(ms for _, ms in loads), os.cpu_count() or 1, []
    others = [(load.other_cores, ms) for load, ms in loads if load.other_cores is not None]
    mean = sum(used * ms for used, ms in others) / total_ms if others else 0.0
    if mean > max(BUSY_CORES, BUSY_SHARE * cores):
        averages = [load.load_average for load, _ in loads if load.load_average is not None]
        average = f", load average up to {max(averages):.1f}" if averages else ""
        notes.append(
            f"the machine was busy: other processes used {mean:.2g} of its {cores} processors during the repeats"
            f"{average}; measure again when it is idle"
        )
    stolen = [(load.steal_share, ms) for load, ms in loads if load.steal_share is not None]
    share = sum(part * ms for part, ms in stolen) / total_ms if stolen else 0.0
    if share > STEAL_SHARE:
        notes.append(
            f"the hypervisor gave {share:.1%} of the processors' time to others during the repeats; measure again later"
        )
    waits = [(load.waited_share, ms) for load, ms in loads if load.waited_share is not None]
    return notes + waiting_notes(sum(part * ms for part, ms in waits) / total_ms if waits else None)


def waiting_notes(share: float | None) -> list[str]:
    """Return a note that says so if ranks had no processor for a part of their time.

    Args:
        share: the share of the time in which their threads could have run; None if it is not known.
    """
    if share is None or share <= WAITED_SHARE:
        return []
    return [
        f"the ranks' threads had no processor in {share:.0%} of the time in which they could have run: "
        "other processes, or more threads than processors, share them"
    ]


def overhead_share(repeat: Repeat) -> float:
    """Return the share of the client's waiting time that no network's forward (text encoder, denoiser, VAE) used."""
    return 1 - sum(repeat.networks_ms.values()) / repeat.client_duration_ms


def summarize_repeats(
    repeats: Sequence[Repeat],
    results: Sequence[GenerationResult],
    batch_size: int,
    replica_size: int = 1,
    flops_result: GenerationResult | None = None,
    ceilings: Sequence[float] = (),
    even: bool = True,
) -> Statistics:
    """Return the statistics over all repeats of one request.

    Args:
        repeats: the times of each repeat, at least one.
        results: the answer of each repeat.
        batch_size: the number of images in one forward.
        replica_size: the number of ranks that compute one image.
        flops_result: an answer whose operations were counted.
        ceilings: the measured matrix product rate of every rank, TFLOP/s.
        even: whether every step does the same operations, so that the median step is typical.

    Returns:
        The statistics.

    Raises:
        ValueError: no rank timed a solver step, as an engine of a plug-in may not.
    """
    last = results[-1]
    if not any(repeat.denoise_steps_ms for repeat in repeats):
        raise ValueError("the engine timed no solver step; its denoising has to enter run.clock.step() for each")
    peaks = [max(peak) for peak in zip(*([rank.peak_memory_mib for rank in r.ranks] for r in results), strict=True)]
    stages = [stage.name for stage in repeats[0].steps]
    durations = {
        name: [next(stage.duration_ms for stage in repeat.steps if stage.name == name) for repeat in repeats]
        for name in stages
    }
    durations[BETWEEN_STAGES] = [repeat.between_stages_ms for repeat in repeats]
    latency = summarize([repeat.total_duration_ms for repeat in repeats])
    evaluations = sum(report.network_evaluations.get("denoiser", 0) for report in last.ranks[::replica_size])
    cache = cache_use([skips for report in last.ranks[::replica_size] for skips in report.skips])
    micro_batches = math.ceil(len(last.samples) / batch_size)
    step = summarize([duration_ms for repeat in repeats for duration_ms in repeat.later_steps_ms])
    first_steps_ms = [repeat.denoise_steps_ms[0].duration_ms for repeat in repeats if len(repeat.denoise_steps_ms) > 1]
    typical_ms = step.median if even else fmean(s.duration_ms for repeat in repeats for s in repeat.denoise_steps_ms)
    flops = None if flops_result is None else flops_per_step(flops_result, replica_size)
    return Statistics(
        latency_ms=latency,
        step_ms=step,
        stage_ms={name: summarize(values) for name, values in durations.items()},
        overhead_share=summarize([overhead_share(repeat) for repeat in repeats]),
        throughput_per_s=1e3 * len(last.samples) / latency.median,
        nfe=evaluations // micro_batches if cache is None else round(cache.computed),
        peak_memory_mib=peaks,
        peak_memory_mib_max=max(peaks),
        flops_per_step=flops,
        achieved_tflops=None if flops is None else flops / typical_ms / 1e9,
        ceiling_tflops=sum(ceilings[:replica_size]) or None,
        comm=max((report.comm for report in last.ranks), key=total_sent_bytes),
        cache=cache,
        energy_j=request_energy(results),
        first_step_ms=summarize(first_steps_ms) if first_steps_ms else None,
    )


def request_energy(results: Sequence[GenerationResult]) -> Summary | None:
    """Return the energy of one request in joules, summed over the ranks that report it, or None if no rank does."""
    energies_j = [[report.energy_j for report in result.ranks if report.energy_j is not None] for result in results]
    return summarize([sum(parts) for parts in energies_j]) if all(energies_j) else None


def cache_use(skips: Sequence[CacheSkips]) -> CacheUse | None:
    """Return the means over images of what a cache skipped, or None if no cache was used."""
    if not skips:
        return None
    return CacheUse(
        evaluations=fmean(s.evaluations for s in skips),
        computed=fmean(s.evaluations - len(s.skipped) for s in skips),
        branches=fmean(s.branches for s in skips),
        branches_computed=fmean(s.branches_computed for s in skips),
    )


def cache_notes(config: CacheConfig, model: str, skips: Sequence[CacheSkips]) -> list[str]:
    """Return notes that say what a cache skipped, as means over all images."""
    use = cache_use(skips)
    if use is None:
        return []
    summary = f"cache={config.name} computed {use.branches_computed:.4g} of {use.branches:.4g} branches per image"
    if use.branches == use.branches_computed:
        return [f"{summary}: it skipped nothing"]
    if use.computed < use.evaluations:
        first = ", ".join(map(str, skips[0].skipped)) or "none"
        summary += (
            f", in {use.computed:.4g} of {use.evaluations:.4g} evaluations; nfe does not count the others, of the "
            f"first image {first}"
        )
    identity = config.coefficients == list(IDENTITY)
    of_model = f"TeaCache's polynomial is the identity, because none is published for model={model}"
    return [summary, of_model] if identity else [summary]


def flops_per_step(flops_result: GenerationResult, replica_size: int) -> float:
    """Return the operations of one solver step of one micro-batch, over the ranks of the first replica."""
    replica = flops_result.ranks[:replica_size]
    return sum(report.flops["denoiser"] for report in replica) / len(replica[0].denoise_steps_ms)


def operators(profile_result: GenerationResult) -> dict[str, list[OperatorTime]]:
    """Return the slowest rank's operators by network: the 20 slowest in order, then one row for all others.

    Calls of the same operator are added up; operators that took no time are left out.
    """
    slowest = max(profile_result.ranks, key=_total_ms)
    return {name: _sum_by_name(parts) for name, parts in slowest.operators.items()}


def _sum_by_name(parts: Sequence[OperatorTime]) -> list[OperatorTime]:
    by_name: dict[str, OperatorTime] = {}
    for part in parts:
        known = by_name.get(part.name, OperatorTime(part.name, 0, 0.0))
        by_name[part.name] = OperatorTime(part.name, known.calls + part.calls, known.self_ms + part.self_ms)
    rows = sorted((row for row in by_name.values() if row.self_ms > 0), key=lambda row: -row.self_ms)
    rest = rows[OPERATORS:]
    others = OperatorTime("others", sum(row.calls for row in rest), sum(row.self_ms for row in rest))
    return [*rows[:OPERATORS], *([others] if rest else [])]


def score_quality(folder: Path, pixels: Sequence[Array], prompts: Sequence[str]) -> tuple[Quality | None, list[str]]:
    """Return the score of one answer's images, or None and the reasons why there is no score.

    Args:
        folder: the checkpoint's folder; its `gallery.safetensors` holds the images to compare with.
        pixels: images (3, height, width), float32 in [0, 1]; videos are not scored.
        prompts: the prompt of each image.
    """
    if pixels[0].ndim == 4:
        return None, ["quality is not scored: it is measured on images, and these are videos"]
    file = folder / FILE
    if not file.is_file():
        return None, [f"quality is not scored: the checkpoint has no {FILE}"]
    try:
        found = score(Gallery.load(file), [to_uint8(image) for image in pixels], prompts)
    except GalleryError as error:
        return None, [f"quality is not scored: {error}"]
    if found is None:
        return None, [f"quality is not scored: no prompt is a name, or a name and a style, of {FILE}"]
    return found, []


def score_pretrained(
    config: QualityConfig, pixels: Sequence[Array], prompts: Sequence[str]
) -> tuple[pretrained.PretrainedScores | None, list[str]]:
    """Return the scores that the user's own weights give, or None and the reasons why requested scores are missing."""
    if pixels[0].ndim == 4:
        is_requested = config.clip is not None or config.features is not None
        return None, ["quality.clip and quality.features score images, and these are videos"] if is_requested else []
    try:
        return pretrained.score(config, [to_uint8(image) for image in pixels], prompts), []
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        return None, [f"quality.clip and quality.features are not scored: {' '.join(str(error).split())}"]


def measure_own(
    config: RunConfig, pixels: Sequence[Array], prompts: Sequence[str]
) -> tuple[dict[str, float], list[str]]:
    """Return the metrics of plug-ins that were requested, and the reasons why metrics are missing."""
    names = config.quality.metrics
    if not names:
        return {}, []
    if pixels[0].ndim == 4:
        return {}, ["quality.metrics are measured on images, and these are videos"]
    return own.measure(names, [to_uint8(image) for image in pixels], prompts, config.plugin)


def hub_commit_note(model: ModelConfig, folder: Path) -> list[str]:
    """Return a note that names the commit of a hub checkpoint, if it has one."""
    found = hub.commit(folder)
    return [] if model.path is None or found is None else [f"model.path={model.path} is commit {found}, in {folder}"]


def base_record(
    run: ResolvedRun,
    info: EngineInfo,
    environment: dict[str, str],
    first: FirstCall,
    beginning: Beginning | None = None,
) -> Record:
    """Return the record of a run before anything is measured.

    Args:
        run: the resolved run.
        info: the state of the ranks.
        environment: the environment variables of the ranks.
        first: the times of starting and loading.
        beginning: what was noted before the run; None notes it now.

    Returns:
        The record, without samples, repeats and summary.
    """
    config, declared = run.config, to_dict(run.config)
    return Record(
        schema=SCHEMA,
        fingerprint=fingerprint(declared),
        overrides=run.overrides,
        config={key: value for key, value in declared.items() if key != PLANNED},
        provenance=provenance(info, environment, beginning, config.plugin_sources),
        attention=AttentionRow(config.attention.backend, info.attention),
        first_call=first,
        repeats=[],
        summary=None,
        samples=[],
        notes=run.notes,
        loaded=info.loaded,
        engine=EngineRow(config.engine.name, engine_version(config.engine.name)),
        search_path=list(run.search.folders),
        primary=run.search.primary,
    )


def build_record(
    run: ResolvedRun,
    request: RequestConfig,
    info: EngineInfo,
    environment: dict[str, str],
    first: FirstCall,
    repeats: list[Repeat],
    results: list[GenerationResult],
    pixels: Sequence[Array],
    flops_result: GenerationResult | None = None,
    profile_result: GenerationResult | None = None,
    beginning: Beginning | None = None,
) -> Record:
    """Return the record of one request of a run; `pixels` are the last answer's samples, whose rows are added later."""
    config = replace(run.config, request=request)
    prompts = [sample.prompt for sample in results[-1].samples]
    folder = run.checkpoint.folder
    scored, reasons = score_quality(folder, pixels, prompts)
    extra, more = score_pretrained(config.quality, pixels, prompts)
    metrics, missing = measure_own(config, pixels, prompts)
    all_notes = dict.fromkeys(
        [
            *run.notes,
            *hub_commit_note(config.model, folder),
            *(note for result in results for report in result.ranks for note in report.notes),
            *cache_notes(config.cache, config.model.name, [s for report in results[-1].ranks for s in report.skips]),
            *reasons,
            *more,
            *missing,
            *machine_notes(repeats),
        ]
    )
    return msgspec.structs.replace(
        base_record(replace(run, config=config), info, environment, first, beginning),
        repeats=repeats,
        summary=summarize_repeats(
            repeats,
            results,
            config.request.batch_size,
            run.replica_size,
            flops_result,
            info.ceiling_tflops,
            even=config.engine.name != CACHE_DIT and config.cache.name == NONE,
        ),
        notes=list(all_notes),
        quality=scored,
        pretrained=extra,
        metrics=metrics,
        profile={} if profile_result is None else operators(profile_result),
    )


def _total_ms(report: RankReport) -> float:
    return sum(stage.duration_ms for stage in report.stages)
