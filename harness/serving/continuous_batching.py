"""The request scheduler with continuous batching: requests join and leave the batch between any two evaluations.

All ranks run in ticks. Rank 0 decides which requests join, on which replica, and which stop. Every rank evaluates its
requests, compatible ones in one forward, and advances each to its next evaluation or its end. Rank 0 then gathers the
finished requests and the progress of the others.
"""

from __future__ import annotations

import time
from collections import Counter as Multiset
from dataclasses import dataclass

import msgspec
import torch

from harness.messages import GenerationRequest, Progress
from harness.parallel.collectives import Collectives
from harness.pipeline.state import Cancelled
from harness.pipeline.step_batching import RequestFiber, evaluate
from harness.serving.control import ControlThread
from harness.serving.outcomes import merge_outcomes
from harness.serving.policy import TrackedRequest
from harness.serving.request_queue import RequestQueue
from harness.serving.worker import Worker


class Join(msgspec.Struct, frozen=True):
    """A request that a replica starts."""

    request: GenerationRequest
    replica: int


class Tick(msgspec.Struct, frozen=True):
    """What rank 0 sends to all ranks: requests that join, ids of requests that stop, and whether it is the last."""

    joins: list[Join] = []
    stops: list[str] = []
    last: bool = False


class TickReport(msgspec.Struct, frozen=True):
    """What a rank reports after a tick.

    Args:
        progress: the progress of its requests.
        ended: the ids of the requests that ended, each with the number of frames of its outcome.
        evaluations: the rank's total number of forwards.
        rows: the batch rows of those forwards.
    """

    progress: list[Progress]
    ended: list[tuple[str, int]]
    evaluations: int
    rows: int


class RankBatch:
    """The running requests of one rank.

    Args:
        worker: this rank's worker.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._fibers: dict[str, RequestFiber[list[bytes]]] = {}
        self._progress: dict[str, Progress] = {}

    def tick(self, tick: Tick) -> list[bytes]:
        """Advance every request of this rank by one evaluation.

        Args:
            tick: the requests that join and stop.

        Returns:
            The frame of a TickReport, then the frames of the outcomes.
        """
        self._progress.clear()
        with torch.inference_mode():
            for request_id in tick.stops:
                if request_id in self._fibers:
                    self._fibers[request_id].advance(Cancelled())
            for join in tick.joins:
                if join.replica == self._worker.position.replica:
                    self._fibers[join.request.request_id] = self._begin(join.request)
            self._evaluate()
        ended = {name: fiber.result for name, fiber in self._fibers.items() if fiber.finished}
        for name in ended:
            del self._fibers[name]
        sizes = [(name, len(frames)) for name, frames in ended.items()]
        counter = self._worker.counter
        report = TickReport(list(self._progress.values()), sizes, counter.evaluations, counter.rows)
        return [msgspec.msgpack.encode(report), *(frame for frames in ended.values() for frame in frames)]

    def _begin(self, request: GenerationRequest) -> RequestFiber[list[bytes]]:
        def on_progress(stage: str, done: int, total: int) -> None:
            self._progress[request.request_id] = Progress(request.request_id, stage, done, total)

        return self._worker.fiber(request, on_progress)

    def _evaluate(self) -> None:
        waiting = [(fiber, fiber.call) for fiber in self._fibers.values() if fiber.call is not None]
        calls = [call for _, call in waiting]
        outputs = evaluate(calls, self._worker.position.replica_size == 1, self._worker.counter.add)
        for (fiber, _), output in zip(waiting, outputs, strict=True):
            fiber.advance(output)


@dataclass
class RunningRequest:
    """A request that a replica runs."""

    tracked: TrackedRequest
    replica: int
    samples: int
    started: float
    stopping: bool = False


class ContinuousBatchScheduler:
    """The scheduler of one rank. Rank 0 owns the sockets; the other ranks sleep in a broadcast until there is a tick.

    Args:
        worker: this rank's worker.
        collectives: the collectives over all ranks.
        max_batch: the largest number of samples that share the forwards of one replica.
    """

    def __init__(self, worker: Worker, collectives: Collectives, max_batch: int) -> None:
        self.worker = worker
        self.collectives = collectives
        self.max_batch = max_batch
        self._batch = RankBatch(worker)
        self._running: dict[str, RunningRequest] = {}
        self._evaluations_and_rows = (0, 0)
        self._served = 0

    def follow(self) -> None:
        """Run the loop of a rank other than 0, until rank 0 broadcasts the last tick."""
        while not (tick := msgspec.msgpack.decode(self.collectives.broadcast(None), type=Tick)).last:
            self.collectives.gather(self._batch.tick(tick))

    def lead(self, request_queue: RequestQueue, control: ControlThread) -> None:
        """Run the loop of rank 0: accept, admit, tick, answer.

        It ends after a client's Shutdown, once all running requests are finished.

        Args:
            request_queue: the queue of requests.
            control: the control thread, whose state is updated.
        """
        control.set_counter(lambda: self._evaluations_and_rows)
        self._publish_state(request_queue, control)
        while self._running or not request_queue.shutting_down:
            request_queue.poll(len(self._running), wait=not self._running and not request_queue.shutting_down)
            joins = [] if request_queue.shutting_down else self._admit(request_queue)
            if joins or self._running:
                self._publish_state(request_queue, control)
                ended = self._tick(Tick(joins, self._stops(request_queue)), request_queue)
                self._publish_state(request_queue, control)  # before the client has its answer and can ask
                for tracked, frames in ended:
                    request_queue.respond(tracked, request_queue.with_stop_reason(tracked, frames))
        control.update("stopping", len(request_queue.queue), self._served)
        request_queue.close()
        self.collectives.broadcast(msgspec.msgpack.encode(Tick(last=True)))

    def _publish_state(self, request_queue: RequestQueue, control: ControlThread) -> None:
        running = len(self._running)
        control.update("busy" if running else "ready", len(request_queue.queue), self._served, running)

    def _admit(self, request_queue: RequestQueue) -> list[Join]:
        """Return the requests that start now: the next one while a replica has room; it never waits for a later one."""
        joins = []
        while (tracked := request_queue.peek()) is not None:
            request = tracked.request
            samples = min(request.batch_size, len(request.prompts) * request.samples_per_prompt)
            replica, batch_size = self._least_loaded()
            if batch_size and batch_size + samples > self.max_batch:
                break
            request_queue.queue.remove(tracked)
            self._running[request.request_id] = RunningRequest(tracked, replica, samples, time.perf_counter())
            joins.append(Join(request, replica))
        return joins

    def _least_loaded(self) -> tuple[int, int]:
        """Return the replica that runs the fewest samples, and their number."""
        batch_size = Multiset({replica: 0 for replica in range(self.worker.position.degrees[0])})
        for running in self._running.values():
            batch_size[running.replica] += running.samples
        replica = min(batch_size, key=lambda r: batch_size[r])
        return replica, batch_size[replica]

    def _stops(self, request_queue: RequestQueue) -> list[str]:
        """Return the ids of the requests that have to stop now."""
        ids = []
        for request_id, running in self._running.items():
            if not running.stopping and request_queue.stop_reason(running.tracked) is not None:
                running.stopping = True
                ids.append(request_id)
        return ids

    def _tick(self, tick: Tick, request_queue: RequestQueue) -> list[tuple[TrackedRequest, list[bytes]]]:
        """Run one tick on all ranks, and return the answers of the requests that ended."""
        self.collectives.broadcast(msgspec.msgpack.encode(tick))
        gathered = self.collectives.gather(self._batch.tick(tick))
        outcomes: dict[str, list[list[bytes]]] = {}
        counts = [0, 0]
        for rank, (header, *frames) in enumerate(gathered):
            report = msgspec.msgpack.decode(header, type=TickReport)
            for request_id, size in report.ended:
                outcomes.setdefault(request_id, []).append(frames[:size])
                frames = frames[size:]
            if rank % self.worker.position.replica_size == 0:
                counts[0] += report.evaluations
                counts[1] += report.rows
                for p in report.progress:
                    request_queue.send_progress(self._running[p.request_id].tracked, p.stage, p.done, p.total)
        self._evaluations_and_rows = (counts[0], counts[1])
        self._served += len(outcomes)
        return [self._answer(self._running.pop(name), of_ranks) for name, of_ranks in outcomes.items()]

    def _answer(self, running: RunningRequest, outcomes: list[list[bytes]]) -> tuple[TrackedRequest, list[bytes]]:
        took_ms = (time.perf_counter() - running.started) * 1e3
        return running.tracked, merge_outcomes(running.tracked.request, outcomes, took_ms)
