"""task=plan: predicts every legal layout of a request, or holds predictions against records, in a claimed folder."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import msgspec
import torch
from rich.console import Console

from harness.config.plan import HardwareConfig
from harness.config.schema import RunConfig
from harness.costs.plan_file import PLAN_SCHEMA, LayoutPrediction, Plan
from harness.costs.request_trace import trace_request
from harness.costs.roofline import device_rates, predict, valid_layouts
from harness.device.device import denoiser_dtype, torch_dtype
from harness.records.record import RunFolder, Status
from harness.resolve.checkpoint import locate
from harness.resolve.compose import ResolvedRun, to_dict, to_yaml
from harness.resolve.layout import layout_facts
from harness.resolve.request import to_message
from harness.resolve.trained import trained_denoiser
from harness.tasks.lifecycle import ended
from harness.tasks.plan.check import check, records
from harness.tasks.plan.measure import filled
from harness.tasks.plan.table import print_checks, print_plan

FILE = "plan.json"


def plan_in(composed: ResolvedRun, folder: RunFolder, console: Console) -> Status:
    """Plans in a claimed folder, whatever happens: the status, which is on disk."""
    config = composed.config
    status, plan = ended(composed, folder, lambda: run_plan(config, folder), lambda done: Status("ok"))
    if plan is not None and config.logger.table:
        if config.runs is None:
            print_plan(plan, config.plan.rows, folder.path, console)
        else:
            print_checks(plan, folder.path, console)
    return status


def run_plan(config: RunConfig, folder: RunFolder) -> Plan:
    """The plan, after it is on disk.

    Raises:
        CheckpointError: a configuration that no network can be built from.
        ValueError: hardware that could not be measured.
    """
    folder.write_config(to_yaml(config))
    plan = planned(config) if config.runs is None else checked(config, Path(config.runs).expanduser())
    folder.write_json(FILE, plan)
    return plan


def planned(config: RunConfig) -> Plan:
    """Every legal layout: those that fit memory first, by the predicted time of the request's denoising."""
    dtype, request = torch_dtype(denoiser_dtype(config.model)), to_message(config.request)
    traced = trace_request(config)
    hardware, measured = filled(config.hardware, dtype, config.launch)
    on = device_rates(hardware, dtype.itemsize)
    denoiser = trained_denoiser(config).weights
    facts = layout_facts(config, locate(config.model, denoiser).config_folder(denoiser))
    micro_batches = math.ceil(len(request.prompts) * request.samples_per_prompt / request.batch_size)
    rows = [
        predict(traced, layout, on, request.steps, micro_batches, notes)
        for layout, notes in valid_layouts(facts, config.plan.ranks, micro_batches)
    ]
    return _plan(config, hardware, measured, layouts=sorted(rows, key=_rank))


def checked(config: RunConfig, tree: Path) -> Plan:
    """Predictions against the records of a tree."""
    measured: list[str] = []
    hardware = config.hardware

    @cache
    def on(dtype: torch.dtype) -> HardwareConfig:
        nonlocal hardware
        hardware, names = filled(hardware, dtype, config.launch)
        measured.extend(names)
        return hardware

    checks = [check(folder, record, on) for folder, record in records(tree)]
    return msgspec.structs.replace(_plan(config, hardware, measured), checks=checks)


def _plan(
    config: RunConfig, hardware: HardwareConfig, measured: list[str], layouts: list[LayoutPrediction] | None = None
) -> Plan:
    return Plan(PLAN_SCHEMA, hardware, measured, to_dict(config), layouts or [], [])


def _rank(row: LayoutPrediction) -> tuple[bool, float, int]:
    return (not row.fits, row.denoising_ms, row.ranks)
