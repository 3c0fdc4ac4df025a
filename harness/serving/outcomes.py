"""The ranks' outcomes of one request as one answer."""

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


def merge(request: GenerationRequest, outcomes: list[list[bytes]], duration_ms: float) -> list[bytes]:
    """The ranks' outcomes as one answer: pictures in the request's order, or the first failure."""
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

    def moved(ref: ArrayRef, frames: list[bytes]) -> ArrayRef:
        array(ref, frames)  # the shape and the bytes agree
        parts.append(frames[ref.frame])
        return msgspec.structs.replace(ref, frame=len(parts))

    renumbered = [
        msgspec.structs.replace(
            sample,
            pixels=moved(sample.pixels, frames),
            latents=None if sample.latents is None else moved(sample.latents, frames),
        )
        for sample, frames in samples
    ]
    return [*encode(GenerationResult(request.request_id, renumbered, reports, duration_ms)), *parts]
