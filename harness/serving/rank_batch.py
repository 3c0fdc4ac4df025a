"""The parts in progress on one rank, advanced tick by tick; all ranks of a replica run the same ticks.

A tick is either a forward, which computes one evaluation of some parts together, or side work: parts that begin, and
parts that decode. So no image waits for the decoding of another one at the end of a forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec
import torch
from torch import Tensor

from harness.messages import DENOISING
from harness.pipeline.state import Cancelled, Evaluation
from harness.pipeline.step_batching import RequestFiber, evaluate
from harness.serving.parts import Part, PartKey
from harness.serving.worker import Worker

SLOW_S = 1.0  # a forward that takes longer and cannot be divided is noted in the request's record
SLOW_NOTE = "cannot be divided: other requests wait for it"
OnPartProgress: TypeAlias = Callable[[PartKey, str], None]
"""Called with a part and the stage that begins."""


class Tick(msgspec.Struct, frozen=True):
    """What the first rank of a replica sends to its ranks.

    Args:
        begin: the parts that begin.
        stops: the parts that stop.
        decode: the parts that decode.
        forward: the parts whose evaluation is computed.
        by_row: whether the forward computes the next row only: one of the two branches of a guided image.
        last: whether this is the last tick.
    """

    begin: list[Part] = []
    stops: list[PartKey] = []
    decode: list[PartKey] = []
    forward: list[PartKey] = []
    by_row: bool = False
    last: bool = False


class TickReport(msgspec.Struct, frozen=True):
    """What a rank reports after a tick: the parts that ended, each with the number of frames of its outcome."""

    ended: list[tuple[PartKey, int]]


@dataclass
class RunningPart:
    """A part in progress.

    Attributes:
        part: the part.
        fiber: the stack that it runs on.
        notes: the notes for its record.
        steps_left: the number of solver steps that it still needs.
        began: the time at which it began, s, on the rank's monotonic clock.
        evaluations: the number of forwards that it has had.
        rows: the output of its pending evaluation, as far as it was computed row by row.
    """

    part: Part
    fiber: RequestFiber[list[bytes]]
    notes: list[str]
    steps_left: int
    began: float = field(default_factory=time.monotonic)
    evaluations: int = 0
    rows: list[Tensor] = field(default_factory=list)


class RankBatch:
    """The parts in progress on one rank.

    Args:
        worker: this rank's worker.
        on_stage: a callback for each stage that begins.

    Attributes:
        parts: the parts in progress, in the order in which they began.
        steps: the progress of parts in the last tick: the stage, the finished solver steps, all steps, and the PNG of a
            preview.
        durations: the times of the last tick by part, s: of beginning or decoding it, or of the forward.
    """

    def __init__(self, worker: Worker, on_stage: OnPartProgress = lambda key, stage: None) -> None:
        self.parts: dict[PartKey, RunningPart] = {}
        self.steps: dict[PartKey, tuple[str, int, int, bytes]] = {}
        self.durations: dict[PartKey, float] = {}
        self._worker = worker
        self._on_stage = on_stage

    def tick(self, tick: Tick) -> list[bytes]:
        """Run one tick.

        Args:
            tick: what to do.

        Returns:
            The frame of a TickReport, then the frames of the outcomes.
        """
        self.steps.clear()
        self.durations.clear()
        with torch.inference_mode():
            for part in tick.begin:
                began = time.perf_counter()
                self._begin(part)
                self.durations[part.key] = time.perf_counter() - began
            for key in tick.stops:
                if key in self.parts and not self.parts[key].fiber.finished:
                    self.parts[key].fiber.advance(Cancelled())
            for key in tick.decode:
                began = time.perf_counter()
                self.parts[key].fiber.advance(None)
                self.durations[key] = time.perf_counter() - began
            running = [self.parts[key] for key in tick.forward]
            if tick.by_row:
                self._evaluate_row(running[0])
            elif running:
                self._evaluate(running)
        ended = {key: running.fiber.result for key, running in self.parts.items() if running.fiber.finished}
        for key in ended:
            del self.parts[key]
        report = TickReport([(key, len(frames)) for key, frames in ended.items()])
        return [msgspec.msgpack.encode(report), *(frame for frames in ended.values() for frame in frames)]

    def _begin(self, part: Part) -> None:
        def on_progress(stage: str, done: int, total: int) -> None:
            if total:
                self.steps[part.key] = stage, done, total, b""
                running.steps_left = total - done
            else:
                self._on_stage(part.key, stage)

        def on_preview(done: int, total: int, preview: bytes) -> None:
            self.steps[part.key] = DENOISING, done, total, preview

        notes: list[str] = []
        fiber = self._worker.fiber(part, on_progress, on_preview, notes)
        running = self.parts[part.key] = RunningPart(part, fiber, notes, part.request.steps)

    def _evaluate(self, running: list[RunningPart]) -> None:
        calls = [each.fiber.call for each in running if each.fiber.call is not None]
        for each, output in zip(running, self._compute(running, calls), strict=True):
            each.evaluations += 1
            each.fiber.advance(output)

    def _evaluate_row(self, running: RunningPart) -> None:
        """Compute the next row of an evaluation; its part advances after the last one."""
        call = running.fiber.call
        assert call is not None
        (output,) = self._compute([running], [call.row(len(running.rows))])
        if isinstance(output, Tensor):
            running.rows.append(output)
            if len(running.rows) < len(call.latent):
                return
            output = torch.cat(running.rows)
        running.rows.clear()
        running.evaluations += 1
        running.fiber.advance(output)

    def _compute(self, running: list[RunningPart], calls: list[Evaluation]) -> list[Tensor | Exception]:
        began = time.perf_counter()
        outputs = evaluate(calls, self._worker.may_answer, self._worker.counter.add)
        seconds = time.perf_counter() - began
        self.durations |= dict.fromkeys((each.part.key for each in running), seconds)
        if seconds > SLOW_S and len(calls) == 1 and not calls[0].is_divisible:
            notes = running[0].notes
            if not any(SLOW_NOTE in note for note in notes):
                notes.append(f"a forward of this image alone took {seconds:.2g} s and {SLOW_NOTE}")
        return outputs
