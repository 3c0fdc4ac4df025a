"""The file `plan.json`: predictions, with every number that they were made of."""

from __future__ import annotations

from typing import Any

import msgspec

from harness.config.plan import HardwareConfig
from harness.config.schema import ParallelConfig

PLAN_SCHEMA = 3


class AxisCollective(msgspec.Struct, frozen=True):
    """What one axis of ranks sends in one evaluation with one kind of collective.

    Args:
        axis: the axis: ulysses, ring, tp, tokens (ring x ulysses), cfg or weights (cfg x ring x ulysses).
        kind: the kind of collective.
        bytes: the bytes that a rank sends.
        calls: the number of collectives.
        between_nodes: whether the axis's ranks are on more than one node.
        transfer_ms: the time of the calls, ms.
        exposed_ms: the part of that time that computing does not hide, ms.
    """

    axis: str
    kind: str
    bytes: int
    calls: int
    between_nodes: bool
    transfer_ms: float
    exposed_ms: float


class LayoutPrediction(msgspec.Struct, frozen=True):
    """The prediction for one layout: of one rank and one evaluation, which is a step of a first-order solver.

    Args:
        layout: the degrees.
        ranks: the product of the degrees.
        flops: the operations.
        attention_flops: the operations that are attention.
        moved_bytes: the bytes between the device and its memory.
        weight_bytes: the bytes of the denoiser's weights.
        other_weight_bytes: the bytes of text encoders and decoder.
        activation_bytes: the larger of the peaks of an evaluation and of decoding.
        memory_bytes: the sum of weights, activations and state.
        fits: whether memory_bytes fit in the device's memory.
        compute_ms: the time of the operations at the attainable rate, ms.
        memory_ms: the time of the moved bytes at the attainable rate, ms.
        exchanges: the collectives, by axis and kind.
        exposed_ms: the exposed time of all collectives, ms.
        step_ms: max(compute, memory) + exposed, ms.
        denoising_ms: the time of the whole request, its micro-batches distributed over replicas, ms.
        notes: notes on padding.
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
    """A record and the prediction for its run; `error` is predicted over measured step time, minus 1.

    Bytes are what the busiest rank sent while it denoised a request, and while it decoded it. Operations are those of
    all ranks of an image in one solver step. They are predicted for the network as written, so not if engine.optimize
    removes some of them. If no time is predicted, `reason` says why.
    """

    folder: str
    layout: ParallelConfig
    threads: int
    step_ms: float
    predicted_step_ms: float | None = None
    error: float | None = None
    sent_bytes: dict[str, int] = {}
    predicted_bytes: dict[str, int] = {}
    decoding_bytes: dict[str, int] = {}
    predicted_decoding_bytes: dict[str, int] = {}
    flops: float | None = None
    predicted_flops: float | None = None
    reason: str | None = None


class Plan(msgspec.Struct, frozen=True):
    """The contents of `plan.json`. Everything in `layouts` is a prediction: nothing of it was run.

    Args:
        schema: the version of this file's schema.
        hardware: the configured hardware, with measured values filled in.
        measured: the keys that were measured on this machine in this run.
        config: the resolved configuration.
        layouts: the predictions by predicted time, those that do not fit last.
        checks: predictions against records, if the configuration names some.
    """

    schema: int
    hardware: HardwareConfig
    measured: list[str]
    config: dict[str, Any]
    layouts: list[LayoutPrediction]
    checks: list[PredictionCheck]
