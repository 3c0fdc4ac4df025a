"""When a stage and a step began and ended, with the device synchronised at both edges."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from harness.messages import StageTime, StepTime


class Clock:
    """Times of one request on one rank.

    Args:
        synchronize: waits until the device has done all its work; called at each edge. On the CPU there is nothing to
            wait for.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self.stages: list[StageTime] = []
        self.steps: list[StepTime] = []
        self.network_ms = 0.0
        self.evaluations = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage."""
        start = self._now()
        yield
        self.stages.append(StageTime(name, self._now() - start))

    @contextmanager
    def step(self) -> Iterator[None]:
        """Times one solver step."""
        start = self._now()
        yield
        self.steps.append(StepTime(len(self.steps), self._now() - start))

    @contextmanager
    def network(self) -> Iterator[None]:
        """Times one network evaluation, and counts it."""
        start = self._now()
        yield
        self.network_ms += self._now() - start
        self.evaluations += 1

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter() * 1e3
