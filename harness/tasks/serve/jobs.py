"""A request that the server has accepted: its progress and its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from harness.messages import DENOISING, QUEUED, Array, Failure, GenerationRequest, GenerationResult, Progress, array


@dataclass(eq=False)
class GenerationJob:
    """One request from its arrival to its answer.

    Its owner calls `on_progress` for every report of rank 0, and then `finish` or `fail` once.

    Attributes:
        request: The request as the client sent it.
        ahead: The number of running or queued requests before this one, while it is queued.
        expires: The deadline, a value of `time.monotonic()`.
        state: queued, running, done or failed (for a failure of any kind).
        done: The number of finished solver steps.
        total: The number of all solver steps, 0 until the first report of steps.
        stage: The stage that rank 0 reported last.
        stage_done: The number of finished parts of that stage: solver steps, or images while they decode.
        stage_total: The number of all its parts; 0 if they are not counted.
        previews: The previews so far, PNGs of the first image.
        arrived: The time of arrival, a value of `time.monotonic()`, as all times that durations are taken from.
        began: The time at which the first stage began.
        ended: The time of the answer.
        arrived_at: The time of arrival on the wall clock, for showing.
        cancelling: Whether the client has cancelled it.
        answer: The result of the ranks.
        pixels: The samples in the request's order, (3, height, width) or (frames, 3, height, width), in [0, 1].
        failure: The reason why there is no result.
    """

    request: GenerationRequest
    ahead: int = 0
    expires: float = float("inf")
    state: str = "queued"
    done: int = 0
    total: int = 0
    stage: str = QUEUED
    stage_done: int = 0
    stage_total: int = 0
    previews: list[bytes] = field(default_factory=list)
    arrived: float = field(default_factory=time.monotonic)
    began: float | None = None
    ended: float | None = None
    arrived_at: float = field(default_factory=time.time)
    cancelling: bool = False
    answer: GenerationResult | None = None
    pixels: list[Array] = field(default_factory=list)
    failure: Failure | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def answered(self) -> bool:
        """Whether the job is done or failed."""
        return self.ended is not None

    @property
    def changed(self) -> asyncio.Event:
        """The event of the next change."""
        return self._changed

    @property
    def began_at(self) -> float | None:
        """The time at which the first stage began, seconds since 1970; None if it has not."""
        return None if self.began is None else self.arrived_at + self.began - self.arrived

    @property
    def ended_at(self) -> float | None:
        """The time of the answer, seconds since 1970; None if there is none."""
        return None if self.ended is None else self.arrived_at + self.ended - self.arrived

    @property
    def elapsed_s(self) -> float:
        """The seconds from its arrival until now, or until its answer."""
        return (time.monotonic() if self.ended is None else self.ended) - self.arrived

    async def wait(self) -> None:
        """Wait until the job is answered."""
        async for _ in self.events():
            pass

    async def events(self) -> AsyncIterator[GenerationJob]:
        """Yield the job now, after each change, and once more after its answer.

        Changes that come faster than the caller reads them are merged into one.

        Yields:
            This job.
        """
        while not self.answered:
            changed = self._changed
            yield self
            await changed.wait()
        yield self

    def set_ahead(self, ahead: int) -> None:
        """Set the number of requests ahead of this one."""
        if ahead != self.ahead:
            self.ahead = ahead
            self._notify()

    def on_progress(self, progress: Progress) -> None:
        """Apply a report of rank 0; the first report of a stage other than the queue starts the job."""
        if progress.stage == QUEUED:
            return
        if self.began is None:
            self.began, self.state, self.ahead = time.monotonic(), "running", 0
        self.stage, self.stage_done, self.stage_total = progress.stage, progress.done, progress.total
        if progress.total and progress.stage == DENOISING:
            self.done, self.total = progress.done, progress.total
        if progress.preview:
            self.previews.append(progress.preview)
        self._notify()

    def queue_again(self) -> None:
        """Put the job back into the queue: the ranks that ran it have died."""
        self.state, self.stage, self.began = "queued", QUEUED, None
        self.done = self.total = self.stage_done = self.stage_total = 0
        self.previews.clear()
        self._notify()

    def finish(self, answer: GenerationResult, frames: Sequence[bytes]) -> None:
        """End the job with its result.

        Args:
            answer: The result of the ranks.
            frames: The frames of the message that carried the result, with the pixels.

        Raises:
            MessageError: The frames do not hold the pixels that the result refers to.
            RuntimeError: The job has already been answered.
        """
        pixels = [array(sample.pixels, frames) for sample in answer.samples]
        self._end("done")
        self.answer, self.pixels = answer, pixels

    def fail(self, failure: Failure) -> None:
        """End the job with a failure.

        Args:
            failure: The reason why there is no result.

        Raises:
            RuntimeError: The job has already been answered.
        """
        self._end("failed")
        self.failure = failure

    def _end(self, state: str) -> None:
        if self.answered:
            raise RuntimeError(f"request {self.request.request_id} has already been answered")
        self.state, self.ahead, self.ended = state, 0, time.monotonic()
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
