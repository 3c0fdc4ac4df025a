"""Running the stages: in order, each timed with the device synchronized before and after it."""

from __future__ import annotations

from typing import Protocol

import torch

from harness.messages import MemoryPoint
from harness.pipeline.stage import Stage
from harness.pipeline.state import RunContext, Sample


class PipelineExecutor(Protocol):
    """Runs the stages over this rank's samples."""

    def execute(self, stages: list[Stage], samples: list[Sample], run: RunContext) -> list[MemoryPoint]:
        """Run the stages in place; return the memory in use after each."""


class SyncExecutor:
    """Runs one stage after another without overlap, so that each time is that of one stage."""

    def execute(self, stages: list[Stage], samples: list[Sample], run: RunContext) -> list[MemoryPoint]:
        """Run the stages in order."""
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
