"""Who runs the stages: in order, each timed with the device synchronised at its edges."""

from __future__ import annotations

from typing import Protocol

import torch

from harness.messages import MemoryPoint
from harness.pipeline.stage import Stage
from harness.pipeline.state import RunContext, Sample


class PipelineExecutor(Protocol):
    """Runs the stages over this rank's samples; returns the memory at the end of each."""

    def execute(self, stages: list[Stage], samples: list[Sample], run: RunContext) -> list[MemoryPoint]: ...


class SyncExecutor:
    """One stage after another, nothing overlapped: what is timed is what ran."""

    def execute(self, stages: list[Stage], samples: list[Sample], run: RunContext) -> list[MemoryPoint]:
        points = []
        with torch.inference_mode():
            for stage in stages:
                run.on_progress(stage.name, 0, 0)
                with run.clock.stage(stage.name):
                    stage.forward(samples, run)
                if sent := run.traffic.take():
                    run.comm[stage.name] = sent
                points.append(MemoryPoint(stage.name, run.memory.used_mib()))
        return points
