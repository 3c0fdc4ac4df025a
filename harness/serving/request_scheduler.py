"""The request scheduler that runs one request after another, on all ranks.

Rank 0 accepts requests; all ranks agree on their order and hand them to their workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import msgspec

from harness.messages import (
    DENOISING,
    Configure,
    EngineInfo,
    Failure,
    GenerationRequest,
    GenerationResult,
    Shutdown,
    decode,
    encode,
)
from harness.parallel.collectives import Collectives
from harness.pipeline.state import OnPreview, OnProgress
from harness.resolve.run import ResolvedRun
from harness.serving.control import ControlThread
from harness.serving.outcomes import merge_outcomes
from harness.serving.policy import evaluation_work
from harness.serving.request_queue import RequestQueue
from harness.serving.speed import SpeedEstimate
from harness.serving.worker import Worker


class CancelFlags(Protocol):
    """Flags of cancelled requests: rank 0 sets them, every rank reads them between steps."""

    def set(self, request_id: str) -> None:
        """Mark a request as cancelled."""

    def is_set(self, request_id: str) -> bool:
        """Return whether a request is marked as cancelled."""

    def clear(self, request_id: str) -> None:
        """Remove the mark: a later request may have the same id."""


class RunLoader(Protocol):
    """Loads another run on this rank, into its worker."""

    def read(self, text: str) -> ResolvedRun:
        """Return the run of a configuration, or raise ValueError."""

    def load(self, run: ResolvedRun) -> EngineInfo:
        """Load a run in place of the last one; all ranks call it at the same time."""


class RequestScheduler:
    """The scheduler of one rank. Rank 0 owns the sockets; the other ranks sleep in a broadcast until there is work.

    Args:
        worker: this rank's worker.
        collectives: the collectives over all ranks.
        cancel_flags: the flags of cancelled requests.
        loader: loads other runs into the worker; None if it runs one configuration for its life.
    """

    def __init__(
        self, worker: Worker, collectives: Collectives, cancel_flags: CancelFlags, loader: RunLoader | None = None
    ) -> None:
        self.worker = worker
        self.loader = loader
        self.collectives = collectives
        self.cancel_flags = cancel_flags

    def follow(self) -> None:
        """Run the loop of a rank other than 0, until rank 0 broadcasts Shutdown."""
        while True:
            message = decode([self.collectives.broadcast(None)])
            if isinstance(message, Configure) and self.loader is not None:
                self.loader.load(self.loader.read(message.config))
                continue
            if not isinstance(message, GenerationRequest):
                return
            is_cancelled = partial(self.cancel_flags.is_set, message.request_id)
            frames = self.worker.generate(message, lambda stage, done, total: None, is_cancelled)
            self.collectives.gather(frames)

    def lead(self, request_queue: RequestQueue, control: ControlThread) -> None:
        """Run the loop of rank 0 until a client sends Shutdown: accept, order, broadcast, run, answer.

        Args:
            request_queue: the queue of requests.
            control: the control thread, whose state is updated.
        """
        served, counter = 0, self.worker.counter
        control.set_counter(lambda: (counter.evaluations, counter.rows))
        control.update("ready", 0, served)
        while (tracked := request_queue.wait_next()) is not None:
            control.update("busy", len(request_queue.queue), served, running=1)
            frames = self.run_request(
                tracked.request,
                partial(request_queue.send_progress, tracked),
                lambda: request_queue.stop_reason(tracked) is not None,
                partial(request_queue.send_progress, tracked, DENOISING),
            )
            served += 1
            self._learn_speed(tracked.request, frames, request_queue.capacity.speed)
            control.update("ready", len(request_queue.queue), served)  # before the client has its answer and can ask
            request_queue.respond(tracked, request_queue.with_stop_reason(tracked, frames))
        control.update("stopping", len(request_queue.queue), served)
        request_queue.close()
        self.stop()

    def _learn_speed(self, request: GenerationRequest, frames: list[bytes], speed: SpeedEstimate) -> None:
        """Learn the time of an evaluation from an answer."""
        answer = decode(frames)
        if not isinstance(answer, GenerationResult):
            return
        size = evaluation_work(request)
        for report in answer.ranks[:: self.worker.position.replica_size]:
            evaluations = report.network_evaluations.get("denoiser", 0)
            if evaluations:
                images = min(request.batch_size, len(request.prompts) * request.samples_per_prompt)
                speed.observe(size, size * images * evaluations, report.networks_ms["denoiser"] / 1e3)

    def configure(self, message: Configure, on_change: Callable[[EngineInfo], None]) -> list[bytes]:
        """Load another run on all ranks, between two requests; call it on rank 0.

        Args:
            message: the command.
            on_change: a callback that receives the engine's new state.

        Returns:
            The frames of the answer: the engine's state, or a Failure of what was not even begun.
        """
        if self.loader is None:
            return encode(Failure("", "rejected", "these ranks run one configuration; start others"))
        try:
            run = self.loader.read(message.config)
        except ValueError as error:
            return encode(Failure("", "rejected", str(error)))
        self.collectives.broadcast(encode(message)[0])
        info = msgspec.structs.replace(self.loader.load(run), state="ready")
        on_change(info)
        return encode(info)

    def stop(self) -> None:
        """Make the other ranks leave their loop."""
        self.collectives.broadcast(encode(Shutdown())[0])

    def run_request(
        self,
        request: GenerationRequest,
        on_progress: OnProgress,
        is_cancelled: Callable[[], bool],
        on_preview: OnPreview | None = None,
    ) -> list[bytes]:
        """Run one accepted request on all ranks.

        Args:
            request: a request that the pipeline has checked.
            on_progress: a callback for each stage and solver step of this rank.
            is_cancelled: a function called between two steps; once it returns True, the other ranks are told to stop.
            on_preview: a callback for each preview of the first image, which this rank's replica generates.

        Returns:
            The frames of the answer.
        """
        self.collectives.broadcast(encode(request)[0])
        posted = False

        def post_cancelled() -> bool:
            nonlocal posted
            if not posted and is_cancelled():
                self.cancel_flags.set(request.request_id)
                posted = True
            return posted

        start = time.perf_counter()
        outcomes = self.collectives.gather(self.worker.generate(request, on_progress, post_cancelled, on_preview))
        if posted:
            self.cancel_flags.clear(request.request_id)
        return merge_outcomes(request, outcomes, (time.perf_counter() - start) * 1e3)
