"""The request scheduler that batches at the level of evaluations: requests join and leave between any two of them.

All ranks go in ticks. Rank 0 says who joins, on which replica, and who stops; every rank evaluates what its requests
wait for, those of a kind in one forward, and lets each go on to its next evaluation or to its end; rank 0 gathers what
ended and how far the others are.
"""

from __future__ import annotations

import time
from collections import Counter as Multiset
from dataclasses import dataclass

import msgspec
import torch

from harness.messages import GenerationRequest, Progress
from harness.parallel.collectives import Collectives
from harness.pipeline.interleave import Course, evaluate
from harness.pipeline.state import Cancelled
from harness.serving.outcomes import merge
from harness.serving.control import ControlThread
from harness.serving.request_queue import Inbox
from harness.serving.policy import Accepted
from harness.serving.worker import Worker


class Join(msgspec.Struct, frozen=True):
    """A request that a replica begins."""

    request: GenerationRequest
    replica: int


class Tick(msgspec.Struct, frozen=True):
    """What rank 0 tells all ranks: requests that join, ids of those that stop; nothing follows the last one."""

    joins: list[Join] = []
    stops: list[str] = []
    last: bool = False


class Ticked(msgspec.Struct, frozen=True):
    """What a rank tells of a tick: how far its requests are, the ids of those that ended with the number of frames of
    each outcome, and its counter of evaluations and rows.
    """

    progress: list[Progress]
    ended: list[tuple[str, int]]
    evaluations: int
    rows: int


class Steps:
    """The requests that one rank is drawing.

    Args:
        worker: this rank's.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._courses: dict[str, Course[list[bytes]]] = {}
        self._progress: dict[str, Progress] = {}

    def tick(self, tick: Tick) -> list[bytes]:
        """One evaluation of every request here: the frames of a Ticked, then those of the outcomes."""
        self._progress.clear()
        with torch.inference_mode():
            for request_id in tick.stops:
                if request_id in self._courses:
                    self._courses[request_id].advance(Cancelled())
            for join in tick.joins:
                if join.replica == self._worker.place.replica:
                    self._courses[join.request.request_id] = self._begin(join.request)
            self._evaluate()
        ended = {name: course.result for name, course in self._courses.items() if course.ended}
        for name in ended:
            del self._courses[name]
        sizes = [(name, len(frames)) for name, frames in ended.items()]
        counter = self._worker.counter
        told = Ticked(list(self._progress.values()), sizes, counter.evaluations, counter.rows)
        return [msgspec.msgpack.encode(told), *(frame for frames in ended.values() for frame in frames)]

    def _begin(self, request: GenerationRequest) -> Course[list[bytes]]:
        def on_progress(stage: str, done: int, total: int) -> None:
            self._progress[request.request_id] = Progress(request.request_id, stage, done, total)

        return self._worker.course(request, on_progress)

    def _evaluate(self) -> None:
        waiting = [(course, course.call) for course in self._courses.values() if course.call is not None]
        calls = [call for _, call in waiting]
        outputs = evaluate(calls, self._worker.place.replica_size == 1, self._worker.counter.add)
        for (course, _), output in zip(waiting, outputs, strict=True):
            course.advance(output)


@dataclass
class Running:
    """A request that a replica is drawing."""

    accepted: Accepted
    replica: int
    pictures: int
    began: float
    stopping: bool = False


class StepScheduler:
    """One a rank. Rank 0 owns the sockets; the others sleep in a broadcast until it has a tick for them.

    Args:
        worker: this rank's.
        collectives: to the other ranks.
        max_batch: pictures that share the forwards of one replica.
    """

    def __init__(self, worker: Worker, collectives: Collectives, max_batch: int) -> None:
        self.worker = worker
        self.collectives = collectives
        self.max_batch = max_batch
        self._steps = Steps(worker)
        self._running: dict[str, Running] = {}
        self._counted = (0, 0)
        self._served = 0

    def follow(self) -> None:
        """The loop of ranks other than 0, until rank 0 says that a tick is the last."""
        while not (tick := msgspec.msgpack.decode(self.collectives.broadcast(None), type=Tick)).last:
            self.collectives.gather(self._steps.tick(tick))

    def lead(self, inbox: Inbox, control: ControlThread) -> None:
        """The loop of rank 0: accept, admit, tick, answer; until a client says Shutdown and what runs is drawn."""
        control.watch(lambda: self._counted)
        self._tell(inbox, control)
        while self._running or not inbox.ending:
            inbox.take_in(len(self._running), wait=not self._running and not inbox.ending)
            joins = [] if inbox.ending else self._admit(inbox)
            if joins or self._running:
                self._tell(inbox, control)
                ended = self._tick(Tick(joins, self._stops(inbox)), inbox)
                self._tell(inbox, control)  # before a client that has its answer can ask
                for accepted, frames in ended:
                    inbox.answer(accepted, inbox.reasoned(accepted, frames))
        control.update("stopping", len(inbox.queue), self._served)
        inbox.close()
        self.collectives.broadcast(msgspec.msgpack.encode(Tick(last=True)))

    def _tell(self, inbox: Inbox, control: ControlThread) -> None:
        running = len(self._running)
        control.update("busy" if running else "ready", len(inbox.queue), self._served, running)

    def _admit(self, inbox: Inbox) -> list[Join]:
        """The requests that begin now: the next one as long as a replica has room; it never waits for a later one."""
        joins = []
        while (accepted := inbox.first()) is not None:
            request = accepted.request
            pictures = min(request.batch_size, len(request.prompts) * request.samples_per_prompt)
            replica, drawn = self._emptiest()
            if drawn and drawn + pictures > self.max_batch:
                break
            inbox.queue.remove(accepted)
            self._running[request.request_id] = Running(accepted, replica, pictures, time.perf_counter())
            joins.append(Join(request, replica))
        return joins

    def _emptiest(self) -> tuple[int, int]:
        """The replica that draws the fewest pictures, and their number."""
        drawn = Multiset({replica: 0 for replica in range(self.worker.place.degrees[0])})
        for running in self._running.values():
            drawn[running.replica] += running.pictures
        replica = min(drawn, key=lambda r: drawn[r])
        return replica, drawn[replica]

    def _stops(self, inbox: Inbox) -> list[str]:
        """The requests that are told to stop now."""
        ids = []
        for request_id, running in self._running.items():
            if not running.stopping and inbox.stopped(running.accepted) is not None:
                running.stopping = True
                ids.append(request_id)
        return ids

    def _tick(self, tick: Tick, inbox: Inbox) -> list[tuple[Accepted, list[bytes]]]:
        """One tick of all ranks: the answers of what ended in it."""
        self.collectives.broadcast(msgspec.msgpack.encode(tick))
        gathered = self.collectives.gather(self._steps.tick(tick))
        outcomes: dict[str, list[list[bytes]]] = {}
        counted = [0, 0]
        for rank, (header, *frames) in enumerate(gathered):
            told = msgspec.msgpack.decode(header, type=Ticked)
            for request_id, size in told.ended:
                outcomes.setdefault(request_id, []).append(frames[:size])
                frames = frames[size:]
            if rank % self.worker.place.replica_size == 0:
                counted[0] += told.evaluations
                counted[1] += told.rows
                for p in told.progress:
                    inbox.tell(self._running[p.request_id].accepted, p.stage, p.done, p.total)
        self._counted = (counted[0], counted[1])
        self._served += len(outcomes)
        return [self._answer(self._running.pop(name), of_ranks) for name, of_ranks in outcomes.items()]

    def _answer(self, running: Running, outcomes: list[list[bytes]]) -> tuple[Accepted, list[bytes]]:
        took_ms = (time.perf_counter() - running.began) * 1e3
        return running.accepted, merge(running.accepted.request, outcomes, took_ms)
