"""Performance dumps of SGLang-Diffusion (`--perf-dump-path`), read as rows beside this project's records.

A dump is one request. It has no version, so that its shape says whether it can be read. It does not say when the
request began. Its steps are synchronised with the device only if SGLANG_DIFFUSION_SYNC_STAGE_PROFILING=1 was set.

Source: `PerformanceLogger.dump_benchmark_report` of SGLang-Diffusion 0.5.23.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from harness.messages import StageTime, StepTime
from harness.metrics.summary import summarize
from harness.records.record import RunFolderError

ENGINE = "sglang (dump)"
MARKS = ({"denoise_steps_ms"}, {"total_duration_ms", "steps"})  # a file with all keys of any of them is meant as a dump
NO_COMMIT = "N/A"  # what SGLang writes outside a checkout
TIMING = "SGLang's own clock; steps are synchronised with the device only if SGLANG_DIFFUSION_SYNC_STAGE_PROFILING=1"


class MemorySnapshot(msgspec.Struct, frozen=True):
    """SGLang's memory after one stage on its main process, MiB; 0 if no device was there."""

    peak_allocated_mb: float


class DumpMeta(msgspec.Struct, frozen=True):
    """What a dump says of its request; a server names the model alone."""

    model: str | None = None
    prompt: str | list[str] | None = None


class PerformanceDump(msgspec.Struct, frozen=True):
    """One request, as SGLang-Diffusion dumps it.

    Attributes:
        timestamp: Time at which the dump was written, ISO 8601.
        request_id: Id of the request.
        commit_hash: Commit of SGLang.
        tag: What wrote the dump.
        total_duration_ms: Time of the request, ms.
        steps: Time of each stage, ms.
        denoise_steps_ms: Time of each solver step, ms; empty if they were not timed.
        memory_checkpoints: Memory after each stage; empty if it was not watched.
        meta: The model and the prompt.
    """

    timestamp: str
    commit_hash: str
    tag: str
    total_duration_ms: float
    steps: list[StageTime]
    denoise_steps_ms: list[StepTime]
    request_id: str | None = None
    memory_checkpoints: dict[str, MemorySnapshot] = {}
    meta: DumpMeta = DumpMeta()

    @property
    def config(self) -> dict[str, Any]:
        """The part of a configuration that the dump holds."""
        prompt = self.meta.prompt
        model = {} if self.meta.model is None else {"model": {"path": self.meta.model}}
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return model if prompts is None else {**model, "request": {"prompts": prompts}}

    @property
    def parts(self) -> dict[str, Any]:
        """The parts of a record that the dump holds, nested as there."""
        summary: dict[str, Any] = {"latency_ms": _one(self.total_duration_ms)}
        if self.denoise_steps_ms:
            times = [step.duration_ms for step in self.denoise_steps_ms]
            summary["step_ms"] = msgspec.to_builtins(summarize(times[1:] or times))
        summary["stage_ms"] = {stage.name: _one(stage.duration_ms) for stage in self.steps}
        peak = max((point.peak_allocated_mb for point in self.memory_checkpoints.values()), default=0.0)
        if peak > 0:
            summary["peak_memory_mib_max"] = peak
        version = "" if self.commit_hash == NO_COMMIT else self.commit_hash
        return {
            "engine": {"name": ENGINE, "version": version},
            "summary": summary,
            "provenance": {"ended": self.timestamp, "timing": TIMING},
        }

    @property
    def repeat(self) -> dict[str, Any]:
        """The request as a repeat of a record, without what the dump does not hold."""
        names = ("total_duration_ms", "steps", "denoise_steps_ms")
        nested: dict[str, Any] = msgspec.to_builtins(self)
        return {name: nested[name] for name in names}


def read_dump(path: Path) -> PerformanceDump | None:
    """Read a performance dump.

    Args:
        path: A JSON file.

    Returns:
        The dump, or None if the file is not meant as one.

    Raises:
        RunFolderError: The file looks like a dump, and is none that this version reads.
    """
    try:
        data = path.read_bytes()
        content = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError):
        return None
    if not any(marks <= content.keys() for marks in MARKS):
        return None
    try:
        dump = msgspec.json.decode(data, type=PerformanceDump)
    except msgspec.MsgspecError as error:
        raise RunFolderError(_unknown(path, str(error))) from error
    if not dump.total_duration_ms > 0:
        raise RunFolderError(_unknown(path, f"total_duration_ms is {dump.total_duration_ms:g}"))
    return dump


def _unknown(path: Path, reason: str) -> str:
    return f"{path}: not a performance dump of SGLang-Diffusion as 0.5.23 writes it ({reason})"


def _one(value: float) -> dict[str, float]:
    """Return the statistics that one measurement has."""
    return {"n": 1, "median": value, "mean": value}
