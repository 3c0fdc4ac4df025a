"""Merging the outcomes of all ranks into the answer to one request."""

from __future__ import annotations

import msgspec

from harness.messages import (
    ArrayRef,
    GenerationRequest,
    GenerationResult,
    MessageError,
    RankOutcome,
    SampleResult,
    array,
    decode,
    encode,
)


def merge_outcomes(request: GenerationRequest, outcomes: list[list[bytes]], duration_ms: float) -> list[bytes]:
    """Merge the ranks' outcomes into one answer: samples in the request's order, or the first failure.

    Args:
        request: the request.
        outcomes: the frames of one RankOutcome per rank.
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
    return [*encode(GenerationResult(request.request_id, renumbered, reports, duration_ms)), *parts]
