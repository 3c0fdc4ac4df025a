"""Merging the outcomes of all ranks, and of all parts, into the answer to one request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import msgspec

from harness.messages import (
    ArrayRef,
    CollectiveTraffic,
    GenerationRequest,
    GenerationResult,
    MemoryPoint,
    MessageError,
    RankOutcome,
    RankReport,
    SampleResult,
    StageTime,
    StepTime,
    array,
    decode,
    encode,
)


def merge_outcomes(request: GenerationRequest, outcomes: list[list[bytes]], duration_ms: float) -> list[bytes]:
    """Merge outcomes into one answer: samples in the request's order, or the first failure.

    Args:
        request: the request.
        outcomes: the frames of one RankOutcome per rank, or per rank and part.
        duration_ms: the duration of the request on the ranks, ms.

    Returns:
        The frames of a GenerationResult or a Failure.

    Raises:
        MessageError: a rank sent something other than a RankOutcome.
    """
    samples: list[tuple[SampleResult, list[bytes]]] = []
    reports = []
    for frames in outcomes:
        outcome = decode(frames)
        if not isinstance(outcome, RankOutcome):
            raise MessageError(f"a rank answered with {type(outcome).__name__}")
        if outcome.failure is not None:
            return encode(outcome.failure)
        if outcome.report is not None:
            reports.append(outcome.report)
        samples += [(sample, frames) for sample in outcome.samples]
    samples.sort(key=lambda pair: pair[0].index)
    parts: list[bytes] = []

    def move(ref: ArrayRef, frames: list[bytes]) -> ArrayRef:
        array(ref, frames)  # raises unless the bytes match the shape
        parts.append(frames[ref.frame])
        return msgspec.structs.replace(ref, frame=len(parts))

    renumbered = [
        msgspec.structs.replace(
            sample,
            pixels=move(sample.pixels, frames),
            latents=None if sample.latents is None else move(sample.latents, frames),
        )
        for sample, frames in samples
    ]
    return [*encode(GenerationResult(request.request_id, renumbered, merge_reports(reports), duration_ms)), *parts]


def merge_reports(reports: Sequence[RankReport]) -> list[RankReport]:
    """Merge the reports of several parts of a request into one per rank, in the order of ranks.

    Parts that run at the same time share their time, so a time is that of the slowest part; counts and traffic add up.

    Args:
        reports: the reports.

    Returns:
        One report per rank.
    """
    by_rank: dict[int, list[RankReport]] = {}
    for report in reports:
        by_rank.setdefault(report.rank, []).append(report)
    return [_merge_parts(by_rank[rank]) for rank in sorted(by_rank)]


def _merge_parts(parts: Sequence[RankReport]) -> RankReport:
    first = parts[0]
    if len(parts) == 1:
        return first
    steps = [step.duration_ms for part in parts for step in part.denoise_steps_ms]
    stages = _largest({stage.name: stage.duration_ms for stage in part.stages} for part in parts)
    memory = _largest({point.name: point.used_mib for point in part.memory_checkpoints} for part in parts)
    names = list(dict.fromkeys(chain.from_iterable(part.network_evaluations for part in parts)))
    return msgspec.structs.replace(
        first,
        stages=[StageTime(name, duration_ms) for name, duration_ms in stages.items()],
        denoise_steps_ms=[StepTime(number, duration_ms) for number, duration_ms in enumerate(steps)],
        networks_ms=_largest(part.networks_ms for part in parts),
        network_evaluations={name: sum(part.network_evaluations.get(name, 0) for part in parts) for name in names},
        peak_memory_mib=max(part.peak_memory_mib for part in parts),
        memory_checkpoints=[MemoryPoint(name, used_mib) for name, used_mib in memory.items()],
        notes=list(dict.fromkeys(note for part in parts for note in part.notes)),
        comm=_sum_traffic([part.comm for part in parts]),
        skips=[skipped for part in parts for skipped in part.skips],
        cpu_s=max((part.cpu_s for part in parts if part.cpu_s is not None), default=None),
        involuntary_switches=max(part.involuntary_switches for part in parts),
    )


def _largest(tables: Iterable[Mapping[str, float]]) -> dict[str, float]:
    largest: dict[str, float] = {}
    for name, value in chain.from_iterable(table.items() for table in tables):
        largest[name] = max(value, largest.get(name, value))
    return largest


def _sum_traffic(
    parts: Sequence[Mapping[str, Mapping[str, CollectiveTraffic]]],
) -> dict[str, dict[str, CollectiveTraffic]]:
    total: dict[str, dict[str, CollectiveTraffic]] = {}
    for stage, kind, sent in ((s, k, sent) for part in parts for s, kinds in part.items() for k, sent in kinds.items()):
        known = total.setdefault(stage, {}).get(kind, CollectiveTraffic(0, 0, 0.0))
        total[stage][kind] = CollectiveTraffic(
            known.bytes + sent.bytes, known.calls + sent.calls, known.exposed_ms + sent.exposed_ms
        )
    return total
