"""A request that the server has accepted: where it stands, and its one answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from harness.messages import QUEUED, Array, Failure, GenerationRequest, GenerationResult, Progress, array


@dataclass(eq=False)
class GenerationJob:
    """One request, from its arrival to its answer. Whoever draws it calls `hear`, then once `finish` or `fail`.

    Args:
        request: as it came.
        ahead: requests before it that are drawn or wait, while it is queued.
        expires: `time.monotonic()` of its deadline.
        state: queued, running, done or failed (whatever the kind of the failure).
        done: solver steps that are finished, of `total`.
        stage: that rank 0 was in last.
        arrived: `time.time()`, as `began` and `ended`.
        answer: what the ranks say of the drawing.
        pixels: its pictures, in the request's order: (3, height, width) or (frames, 3, height, width), in [0, 1].
        failure: why there are none.
    """

    request: GenerationRequest
    ahead: int = 0
    expires: float = float("inf")
    state: str = "queued"
    done: int = 0
    total: int = 0
    stage: str = QUEUED
    arrived: float = field(default_factory=time.time)
    began: float | None = None
    ended: float | None = None
    answer: GenerationResult | None = None
    pixels: list[Array] = field(default_factory=list)
    failure: Failure | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def answered(self) -> bool:
        """Whether it is done or failed."""
        return self.ended is not None

    async def wait(self) -> None:
        """Returns once it is answered."""
        async for _ in self.events():
            pass

    async def events(self) -> AsyncIterator[GenerationJob]:
        """Itself as it is, then after each change, last after the answer; changes that come faster than they are taken
        are one."""
        while not self.answered:
            changed = self._changed
            yield self
            await changed.wait()
        yield self

    def move(self, ahead: int) -> None:
        """As many requests are ahead of it."""
        if ahead != self.ahead:
            self.ahead = ahead
            self._tell()

    def hear(self, progress: Progress) -> None:
        """What rank 0 reports; the first that is not of the queue begins it."""
        if progress.stage == QUEUED:
            return
        if self.began is None:
            self.began, self.state, self.ahead = time.time(), "running", 0
        self.stage = progress.stage
        if progress.total:
            self.done, self.total = progress.done, progress.total
        self._tell()

    def finish(self, answer: GenerationResult, frames: Sequence[bytes]) -> None:
        """It was drawn; `frames` are those of the answer.

        Raises:
            MessageError: pixels that the frames do not hold.
            RuntimeError: it was answered before.
        """
        pixels = [array(sample.pixels, frames) for sample in answer.samples]
        self._end("done")
        self.answer, self.pixels = answer, pixels

    def fail(self, failure: Failure) -> None:
        """It was not drawn.

        Raises:
            RuntimeError: it was answered before.
        """
        self._end("failed")
        self.failure = failure

    def _end(self, state: str) -> None:
        if self.answered:
            raise RuntimeError(f"request {self.request.request_id} was answered before")
        self.state, self.ahead, self.ended = state, 0, time.time()
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
