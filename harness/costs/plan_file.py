"""`plan.json`: predictions, with every number that they were made of."""

from __future__ import annotations

from typing import Any

import msgspec

from harness.config.plan import HardwareConfig
from harness.config.schema import ParallelConfig

PLAN_SCHEMA = 1


class AxisCollective(msgspec.Struct, frozen=True):
    """What one axis of ranks sends in one evaluation.

    Args:
        axis: ulysses, ring, tp, tokens (ring x ulysses) or cfg.
        kind: of collective.
        bytes: that a rank sends.
        calls: collectives.
        between_nodes: its ranks are on more than one node.
        transfer_ms: what the calls take.
        exposed_ms: what of it is not hidden behind computing.
    """

    axis: str
    kind: str
    bytes: int
    calls: int
    between_nodes: bool
    transfer_ms: float
    exposed_ms: float


class LayoutPrediction(msgspec.Struct, frozen=True):
    """One layout. Numbers are of one rank and one evaluation of the denoiser, which is a step of a first-order solver.

    Args:
        layout: degrees.
        ranks: their product.
        flops: operations.
        attention_flops: those of them that are attention.
        moved_bytes: between the device and its memory.
        weight_bytes: of the denoiser.
        other_weight_bytes: of text encoders and decoder.
        activation_bytes: the larger peak of an evaluation and of decoding.
        memory_bytes: all of that, and the state.
        fits: in the device's memory.
        compute_ms: the operations at the attainable rate.
        memory_ms: the moved bytes at the attainable rate.
        exchanges: by axis and kind.
        exposed_ms: of all of them.
        step_ms: max(compute, memory) + exposed.
        denoising_ms: the whole request, its micro-batches dealt over replicas.
        notes: padding, in words.
    """

    layout: ParallelConfig
    ranks: int
    flops: int
    attention_flops: int
    moved_bytes: int
    weight_bytes: int
    other_weight_bytes: int
    activation_bytes: int
    memory_bytes: int
    fits: bool
    compute_ms: float
    memory_ms: float
    exchanges: list[AxisCollective]
    exposed_ms: float
    step_ms: float
    denoising_ms: float
    notes: list[str]


class PredictionCheck(msgspec.Struct, frozen=True):
    """A record, and what is predicted of its run; `error` is predicted over measured step time, less 1.

    Bytes are what the busiest rank sent while it denoised a request, operations those of all ranks of a picture in one
    solver step. Operations are predicted of the network as it is written, so not where engine.optimize spares some of
    them. Where nothing is predicted, `reason` says why.
    """

    folder: str
    layout: ParallelConfig
    threads: int
    step_ms: float
    predicted_step_ms: float | None = None
    error: float | None = None
    sent_bytes: dict[str, int] = {}
    predicted_bytes: dict[str, int] = {}
    flops: float | None = None
    predicted_flops: float | None = None
    reason: str | None = None


class Plan(msgspec.Struct, frozen=True):
    """`plan.json`. Everything in `layouts` is a prediction: nothing of it was run.

    Args:
        schema: of this file.
        hardware: as configured, with what was measured filled in.
        measured: its keys that were measured on this machine, in this run.
        config: the resolved configuration.
        layouts: by predicted time, those that do not fit last.
        checks: predictions against records, where runs names some.
    """

    schema: int
    hardware: HardwareConfig
    measured: list[str]
    config: dict[str, Any]
    layouts: list[LayoutPrediction]
    checks: list[PredictionCheck]
