"""The rows of one run in the long tables: its repeats, their stages and solver steps, and its images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, TypeAlias

import msgspec

from harness.records.images import FILE, RequestTimes, read_images
from harness.records.record import BETWEEN_STAGES
from harness.records.tree import TreeRun, plain

Rows: TypeAlias = Iterator[dict[str, Any]]


def repeat_rows(run: TreeRun) -> Rows:
    """Yield one row per measured request; those of a data set are its requests.

    Args:
        run: The run.

    Yields:
        The number of the repeat, from 0, and its times in ms.
    """
    for number, repeat in enumerate(run.record.repeats if run.record is not None else ()):
        yield {
            "repeat": number,
            "total_duration_ms": repeat.total_duration_ms,
            "client_duration_ms": repeat.client_duration_ms,
            "between_stages_ms": repeat.between_stages_ms,
            **{f"networks_ms.{name}": value for name, value in repeat.networks_ms.items()},
            **{f"machine.{name}": value for name, value in plain(repeat.machine).items()},
        }
    for number, request in enumerate(_requests(run)):
        times = msgspec.structs.asdict(request)
        del times["stage_ms"], times["peak_memory_mib"]
        yield {"repeat": number, **times, "peak_memory_mib_max": max(request.peak_memory_mib)}
    if run.dump is not None:
        yield {"repeat": 0, "total_duration_ms": run.dump.total_duration_ms}


def stage_rows(run: TreeRun) -> Rows:
    """Yield one row per stage of each repeat; `between_stages` is the rest of the request.

    Args:
        run: The run.

    Yields:
        The repeat, the stage, its time in ms, and the memory at its end in MiB.
    """
    for number, repeat in enumerate(run.record.repeats if run.record is not None else ()):
        used = {point.name: point.used_mib for point in repeat.memory_checkpoints}
        for stage in repeat.steps:
            memory = {"used_mib": used[stage.name]} if stage.name in used else {}
            yield {"repeat": number, "stage": stage.name, "duration_ms": stage.duration_ms, **memory}
        yield {"repeat": number, "stage": BETWEEN_STAGES, "duration_ms": repeat.between_stages_ms}
    for number, request in enumerate(_requests(run)):
        for name, duration_ms in request.stage_ms.items():
            yield {"repeat": number, "stage": name, "duration_ms": duration_ms}
    for stage in run.dump.steps if run.dump is not None else ():
        yield {"repeat": 0, "stage": stage.name, "duration_ms": stage.duration_ms}


def step_rows(run: TreeRun) -> Rows:
    """Yield one row per solver step of each repeat; a data set's steps are not recorded one by one.

    Args:
        run: The run.

    Yields:
        The repeat, the step and its time in ms.
    """
    repeats = [] if run.record is None else [repeat.denoise_steps_ms for repeat in run.record.repeats]
    for number, steps in enumerate(repeats if run.dump is None else [run.dump.denoise_steps_ms]):
        for step in steps:
            yield {"repeat": number, "step": step.step, "duration_ms": step.duration_ms}


def image_rows(run: TreeRun) -> Rows:
    """Yield one row per image or video on disk; `path` is relative to the run's folder.

    Args:
        run: The run.

    Yields:
        The image's file, prompt, seed and hash; of a data set, its scores and sizes too.
    """
    if run.record is not None and run.record.dataset is None:
        for number, sample in enumerate(run.record.samples):
            yield {"image": number, **plain(sample)}
    elif run.record is not None and (run.folder / FILE).is_file():
        for row in read_images(run.folder):
            own = msgspec.structs.asdict(row)
            yield {"image": own.pop("index"), **{name: value for name, value in own.items() if name != "request"}}


def _requests(run: TreeRun) -> Iterator[RequestTimes]:
    """Yield the requests of a data set."""
    if run.record is not None and run.record.dataset is not None and (run.folder / FILE).is_file():
        yield from (row.request for row in read_images(run.folder) if row.request is not None)


LONG_ROWS: MappingProxyType[str, Callable[[TreeRun], Rows]] = MappingProxyType(
    {"repeats": repeat_rows, "stages": stage_rows, "steps": step_rows, "images": image_rows}
)
"""The rows of one run by what a row is."""
