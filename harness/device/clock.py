"""The times of stages and steps, with the device synchronized at both edges."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from harness.device.trace import NoTrace
from harness.device.usage import ProcessUsage
from harness.messages import OperatorTime, StageTime, StepTime


class Clock:
    """The times of one request on one rank.

    Args:
        synchronize: Function that waits until the device has done all its work; called at each edge. On the CPU there
            is nothing to wait for.
        count_flops: Whether the networks' operations are counted too; the times are then not meaningful.
        profile: Whether the networks' operators are timed too, with the same effect.
        trace: The trace of the request; None if it is not traced.
    """

    def __init__(
        self,
        synchronize: Callable[[], None],
        count_flops: bool = False,
        profile: bool = False,
        trace: NoTrace | None = None,
    ) -> None:
        self._synchronize = synchronize
        self._count_flops = count_flops
        self._profile = profile
        self.trace = NoTrace() if trace is None else trace
        self._used_before = ProcessUsage.now()
        self.stages: list[StageTime] = []
        self.steps: list[StepTime] = []
        self.networks_ms: dict[str, float] = {}
        self.evaluations: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self.operators: dict[str, list[OperatorTime]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        with self.trace.nvtx(name):
            start = self._now()
            yield
            took = self._now() - start
        self.stages.append(StageTime(name, took))
        self.trace.add("stage", name, start, took)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one solver step."""
        number = len(self.steps)
        with self.trace.nvtx(f"step {number}"):
            start = self._now()
            yield
            took = self._now() - start
        self.steps.append(StepTime(number, took))
        self.trace.add("step", f"step {number}", start, took)

    @contextmanager
    def network(self, name: str, counted: bool = True) -> Iterator[None]:
        """Time one forward of a network.

        Args:
            name: text_encoder, denoiser or decoder.
            counted: Whether the forward counts as an evaluation; the second forward of a guided pair does not.

        Yields:
            None, while the forward runs.
        """
        with self.trace.nvtx(name):
            start = self._now()
            with ExitStack() as watchers:
                self._watch(name, watchers)
                yield
            took = self._now() - start
        self.networks_ms[name] = self.networks_ms.get(name, 0.0) + took
        self.trace.add("network", name, start, took)
        self.evaluations[name] = self.evaluations.get(name, 0) + counted

    def discount(self, name: str, evaluations: int) -> None:
        """Subtract evaluations of a network that were skipped in the end."""
        self.evaluations[name] -= evaluations

    def process_usage(self) -> ProcessUsage:
        """Return what this process used since the request began."""
        return ProcessUsage.now().since(self._used_before)

    def _watch(self, name: str, watchers: ExitStack) -> None:
        if self._count_flops:
            from harness.device.flops import count_operations

            def add(flops: int) -> None:
                self.flops[name] = self.flops.get(name, 0) + flops

            watchers.enter_context(count_operations(add))
        if self._profile:
            from harness.device.profile import profile_operators

            watchers.enter_context(profile_operators(self.operators.setdefault(name, []).extend))

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter() * 1e3
