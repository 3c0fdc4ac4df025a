"""task=plan: predict every valid layout of a request, or compare predictions with records, in a claimed folder."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import msgspec
import torch

from harness.config.plan import HardwareConfig
from harness.config.schema import RunConfig
from harness.costs.plan_file import PLAN_SCHEMA, LayoutPrediction, Plan
from harness.costs.request_trace import trace_request
from harness.costs.roofline import device_rates, predict, valid_layouts
from harness.device.device import denoiser_dtype, torch_dtype
from harness.records.record import RunFolder
from harness.resolve.compose import ResolvedRun, to_dict, to_yaml
from harness.resolve.request import to_message
from harness.tasks.plan.check import check, native_records
from harness.tasks.plan.measure import with_measured_rates

FILE = "plan.json"


def run_plan(config: RunConfig, folder: RunFolder) -> Plan:
    """Make the plan and write it to disk.

    Args:
        config: The resolved configuration.
        folder: The claimed folder.

    Returns:
        The plan.

    Raises:
        CheckpointError: No network can be built from the configuration.
        ValueError: The hardware could not be measured.
    """
    folder.write_config(to_yaml(config))
    plan = (
        plan_layouts(config) if config.plan.runs is None else check_records(config, Path(config.plan.runs).expanduser())
    )
    folder.write_json(FILE, plan)
    return plan


def plan_layouts(config: RunConfig) -> Plan:
    """Predict every valid layout.

    Args:
        config: The resolved configuration.

    Returns:
        The plan: layouts that fit memory first, then by the predicted denoising time of the request.
    """
    dtype, request = torch_dtype(denoiser_dtype(config.model)), to_message(config.request)
    run = ResolvedRun(config)
    traced = trace_request(run)
    hardware, measured = with_measured_rates(config.hardware, dtype, config.launch)
    machine = device_rates(hardware, dtype.itemsize)
    micro_batches = math.ceil(len(request.prompts) * request.samples_per_prompt / request.batch_size)
    rows = [
        predict(traced, layout, machine, request.steps, micro_batches, notes)
        for layout, notes in valid_layouts(config, run.shape, config.plan.ranks, micro_batches)
    ]
    return _make_plan(config, hardware, measured, layouts=sorted(rows, key=_sort_key))


def check_records(config: RunConfig, tree: Path) -> Plan:
    """Compare predictions with the records below a folder.

    Args:
        config: The resolved configuration, with the hardware.
        tree: Folder with run folders at any depth.

    Returns:
        The plan, with one check per record and no layouts.
    """
    measured: list[str] = []
    hardware = config.hardware

    @cache
    def hardware_for(dtype: torch.dtype) -> HardwareConfig:
        nonlocal hardware
        hardware, names = with_measured_rates(hardware, dtype, config.launch)
        measured.extend(names)
        return hardware

    checks = [check(folder, record, hardware_for) for folder, record in native_records(tree)]
    return msgspec.structs.replace(_make_plan(config, hardware, measured), checks=checks)


def _make_plan(
    config: RunConfig, hardware: HardwareConfig, measured: list[str], layouts: list[LayoutPrediction] | None = None
) -> Plan:
    return Plan(PLAN_SCHEMA, hardware, measured, to_dict(config), layouts or [], [])


def _sort_key(row: LayoutPrediction) -> tuple[bool, float, int]:
    return (not row.fits, row.denoising_ms, row.ranks)
