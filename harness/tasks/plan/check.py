"""Predictions against records: step time, bytes and operations of runs that are on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import torch

from harness.config.cache import NONE
from harness.config.optimize import Optimize
from harness.config.plan import HardwareConfig
from harness.config.schema import Load, ParallelConfig
from harness.config.yaml import from_dict
from harness.costs.plan_file import PredictionCheck
from harness.costs.request_trace import RequestTrace, decode_traffic, trace_request
from harness.costs.roofline import device_rates, predict, traffic
from harness.device.device import denoiser_dtype, torch_dtype
from harness.records.record import Record, read_record
from harness.resolve.layout_rules import is_approximate
from harness.resolve.names import one_line
from harness.resolve.run import ResolvedRun


def native_records(tree: Path) -> Iterator[tuple[Path, Record]]:
    """Yield the records of native runs below a folder in which requests were timed.

    Args:
        tree: Folder with run folders at any depth.

    Yields:
        The folder and the record of each run.

    Raises:
        RunFolderError: A record has another schema.
    """
    for file in sorted(tree.rglob("record.json")):
        record = read_record(file.parent)
        if record is not None and record.summary is not None and record.engine.name == "native":
            yield file.parent, record


def check(folder: Path, record: Record, hardware: Callable[[torch.dtype], HardwareConfig]) -> PredictionCheck:
    """Compare one record with the prediction for its run.

    Args:
        folder: The run's folder.
        record: Record of a native run.
        hardware: Function that returns the machine with its rates for a dtype.

    Returns:
        The measured and the predicted numbers, or the reason why nothing is predicted.
    """
    summary = record.statistics
    found = PredictionCheck(
        folder=folder.name,
        layout=msgspec.convert(record.config["parallel"], ParallelConfig),
        threads=record.provenance.threads_per_rank,
        step_ms=summary.step_ms.median,
        sent_bytes=_stage_bytes(record, "denoising"),
        decoding_bytes=_stage_bytes(record, "decoding"),
        flops=summary.flops_per_step,
    )
    try:
        return _with_prediction(found, record, hardware)
    except (ValueError, OSError) as error:
        return msgspec.structs.replace(found, reason=one_line(error))


def _with_prediction(
    found: PredictionCheck, record: Record, hardware: Callable[[torch.dtype], HardwareConfig]
) -> PredictionCheck:
    config = from_dict(record.config)
    config.model.load = Load.dummy
    if config.cache.name != NONE:
        raise ValueError(f"cache={config.cache.name} computes fewer evaluations, which is not predicted")
    if record.dataset is not None:
        raise ValueError("the requests of a data set may differ in size, and are not predicted")
    request, steps, layout = config.request, config.request.steps or 1, found.layout
    dtype = torch_dtype(denoiser_dtype(config.model))
    run = ResolvedRun(config)
    traced = trace_request(run)
    micro_batches = math.ceil(math.ceil(len(record.samples) / request.batch_size) / layout.dp)
    denoising, decoding = _busiest_rank(run, traced, record.statistics.nfe * micro_batches, micro_batches)
    found = msgspec.structs.replace(found, predicted_bytes=denoising, predicted_decoding_bytes=decoding)
    if is_approximate(layout):
        reason = "time not predicted: its keys and values are stale, and only exact layouts are predicted"
        return msgspec.structs.replace(found, reason=reason)
    row = predict(traced, layout, device_rates(hardware(dtype), dtype.itemsize), record.statistics.nfe, 1, [])
    evaluations_per_step = record.statistics.nfe / steps
    optimized = config.engine.optimize in (Optimize.eager, Optimize.compile)
    return msgspec.structs.replace(
        found,
        predicted_step_ms=row.step_ms * evaluations_per_step,
        error=row.step_ms * evaluations_per_step / found.step_ms - 1,
        predicted_flops=None if optimized else row.flops * run.replica_size * record.statistics.nfe / steps,
    )


def _busiest_rank(
    run: ResolvedRun, traced: RequestTrace, evaluations: int, micro_batches: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Return what the rank that sends most sends to denoise and to decode, in bytes by kind of collective."""
    ranks = [
        (
            {kind: evaluations * count for kind, count in traffic(traced, run.config.parallel, index).items()},
            {kind: micro_batches * count for kind, count in decoding.items()},
        )
        for index, decoding in enumerate(decode_traffic(run))
    ]
    return max(ranks, key=lambda stages: sum(sum(kinds.values()) for kinds in stages))


def _stage_bytes(record: Record, stage: str) -> dict[str, int]:
    return {kind: sent.bytes for kind, sent in record.statistics.comm.get(stage, {}).items() if sent.bytes}
