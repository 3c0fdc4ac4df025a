"""The request scheduler: rank 0 takes requests in, all ranks agree on their order and hand them to their workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from harness.messages import GenerationRequest, Shutdown, decode, encode
from harness.parallel.collectives import Collectives
from harness.pipeline.state import OnProgress
from harness.serving.outcomes import merge
from harness.serving.control import ControlThread
from harness.serving.request_queue import Inbox
from harness.serving.worker import Worker


class CancelBoard(Protocol):
    """Where rank 0 posts that a request shall not be drawn to its end, and every rank looks between steps."""

    def post(self, request_id: str) -> None: ...

    def is_posted(self, request_id: str) -> bool: ...


class RequestScheduler:
    """One a rank, one request after another. Rank 0 owns the sockets; the others sleep in a broadcast until it has
    something for them.

    Args:
        worker: this rank's.
        collectives: to the other ranks.
        board: where cancellations are posted.
    """

    def __init__(self, worker: Worker, collectives: Collectives, board: CancelBoard) -> None:
        self.worker = worker
        self.collectives = collectives
        self.board = board

    def follow(self) -> None:
        """The loop of ranks other than 0, until rank 0 says Shutdown."""
        while True:
            message = decode([self.collectives.broadcast(None)])
            if not isinstance(message, GenerationRequest):
                return
            is_cancelled = partial(self.board.is_posted, message.request_id)
            frames = self.worker.generate(message, lambda stage, done, total: None, is_cancelled)
            self.collectives.gather(frames)

    def lead(self, inbox: Inbox, control: ControlThread) -> None:
        """The loop of rank 0: accept, order, broadcast, run, answer; until a client says Shutdown."""
        served, counter = 0, self.worker.counter
        control.watch(lambda: (counter.evaluations, counter.rows))
        control.update("ready", 0, served)
        while (accepted := inbox.next()) is not None:
            control.update("busy", len(inbox.queue), served, running=1)
            frames = self.answer(
                accepted.request, partial(inbox.tell, accepted), lambda: inbox.stopped(accepted) is not None
            )
            served += 1
            control.update("ready", len(inbox.queue), served)  # before a client that has its answer can ask
            inbox.answer(accepted, inbox.reasoned(accepted, frames))
        control.update("stopping", len(inbox.queue), served)
        inbox.close()
        self.stop()

    def stop(self) -> None:
        """Tells the other ranks to leave their loop."""
        self.collectives.broadcast(encode(Shutdown())[0])

    def answer(
        self, request: GenerationRequest, on_progress: OnProgress, is_cancelled: Callable[[], bool]
    ) -> list[bytes]:
        """Runs one accepted request on all ranks; the frames of the answer.

        Args:
            request: one that the pipeline has checked.
            on_progress: told of each stage and solver step of this rank.
            is_cancelled: asked between two steps; once it says yes, the other ranks are told.
        """
        self.collectives.broadcast(encode(request)[0])
        posted = False

        def post_cancelled() -> bool:
            nonlocal posted
            if not posted and is_cancelled():
                self.board.post(request.request_id)
                posted = True
            return posted

        start = time.perf_counter()
        outcomes = self.collectives.gather(self.worker.generate(request, on_progress, post_cancelled))
        return merge(request, outcomes, (time.perf_counter() - start) * 1e3)
