"""The loop of a replica: its first rank takes parts from the dispatcher, plans the ticks, and reports what ended.

Replicas do not wait for one another. The other ranks of a replica follow the ticks in a broadcast of the replica.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import zmq

from harness.parallel.collectives import Collectives
from harness.serving.parts import Part, PartKey
from harness.serving.rank_batch import RankBatch, RunningPart, Tick, TickReport
from harness.serving.speed import SpeedEstimate
from harness.serving.transport import has_message
from harness.serving.turns import Turns
from harness.serving.worker import Worker

FORWARD_S = 0.5  # the longest forward, where dividing it can do it
PATIENCE = 10.0  # an image is passed by those of its client that begin within this many times the time that it needs
SIDE_S = 0.1  # the longest side work between two forwards, apart from a single part's
SMALLEST = 4.0  # a forward of an image smaller than the default one over this costs as much as of one of that size
WATCH_MS = 1000
REPORT_S = 0.05  # the shortest interval between two reports of progress alone: each one wakes the dispatcher


Forward: TypeAlias = tuple[float, float, float]
"""The size and the work of a forward, and its time, s."""


class Orders(msgspec.Struct, frozen=True):
    """What the dispatcher sends to a replica: parts to begin, parts to stop, and whether it has to end."""

    begin: list[Part] = []
    stops: list[PartKey] = []
    last: bool = False


class PartProgress(msgspec.Struct, frozen=True):
    """The progress of a part; 0 of 0 at the start of a stage. A preview is a PNG of its x0 estimate."""

    key: PartKey
    stage: str
    done: int = 0
    total: int = 0
    preview: bytes = b""


class ReplicaReport(msgspec.Struct, frozen=True):
    """What a replica sends to the dispatcher; the frames of the outcomes follow, rank by rank.

    Args:
        progress: the progress of parts.
        ended: the parts that ended and the numbers of frames of their outcomes, rank by rank.
        evaluations: the number of forwards so far.
        rows: the batch rows of those forwards.
        forwards: the size, the work and the seconds of each forward since the last report.
    """

    progress: list[PartProgress] = []
    ended: list[list[tuple[PartKey, int]]] = []
    evaluations: int = 0
    rows: int = 0
    forwards: list[Forward] = []


@dataclass(frozen=True)
class BatchLimits:
    """The bounds of the parts that share a replica.

    Args:
        max_batch: the number of images of the default size whose work one forward may have.
        default_work: the work of one evaluation of an image of the model's default request.
    """

    max_batch: int
    default_work: float

    @property
    def forward_work(self) -> float:
        """The largest work of a forward of several images."""
        return self.max_batch * self.default_work

    @property
    def max_parts(self) -> int:
        """The largest number of parts in progress on one replica."""
        return 4 * self.max_batch


class ForwardPlanner:
    """Chooses the parts of the next forward: turns between clients by work, and within a client those that end soon.

    Within a client the shortest remaining time is first, which gives the lowest mean latency (Schrage 1968); a part
    that needs t seconds is passed only by those that begin within PATIENCE * t seconds after it.

    Args:
        limits: the bounds of a forward.
        speed: what is known of the machine.
    """

    def __init__(self, limits: BatchLimits, speed: SpeedEstimate) -> None:
        self._limits = limits
        self._speed = speed
        self._clients: Turns[str] = Turns()

    def plan(self, waiting: list[RunningPart]) -> Tick:
        """Return the tick of the next forward.

        The part whose turn it is leads. Others whose evaluation fits into its forward ride along, in turn.

        Args:
            waiting: the parts that wait for an evaluation, at least one, in the order in which they began.
        """
        waiting = sorted(waiting, key=self._turn)
        lead = waiting[0]
        call = lead.fiber.call
        assert call is not None
        limit, work, chosen = self._forward_limit(lead.part.work), lead.part.work, [lead]
        for other in [] if lead.rows else waiting[1:]:
            key = None if other.fiber.call is None or other.rows else other.fiber.call.batch_key
            if key == call.batch_key and work + other.part.work <= limit:
                chosen.append(other)
                work += other.part.work
        by_row = bool(lead.rows) or (lead.part.work > limit and call.is_divisible)
        self._clients.begin(lead.part.client)
        for each in chosen:
            cost = max(each.part.work / (len(call.latent) if by_row else 1), self._limits.default_work / SMALLEST)
            self._clients.charge(each.part.client, cost)
        return Tick(forward=[each.part.key for each in chosen], by_row=by_row)

    def charge_preview(self, part: Part, seconds: float) -> None:
        """Count the time of a preview as work of its client.

        Args:
            part: the part that had the preview.
            seconds: the time that the preview took, s.
        """
        second = self._speed.expected_s(part.work, 1.0)
        self._clients.charge(part.client, part.work if second is None else seconds / second)

    def _turn(self, running: RunningPart) -> tuple[float, float]:
        work = running.part.work
        evaluation_s = self._speed.expected_s(work, work) or 0.0
        return self._clients.start(running.part.client), running.began + PATIENCE * running.steps_left * evaluation_s

    def _forward_limit(self, size: float) -> float:
        """Return the largest work of a forward of images of this size: max_batch images, and about FORWARD_S."""
        second = self._speed.expected_s(size, 1.0)
        return self._limits.forward_work if second is None else min(self._limits.forward_work, FORWARD_S / second)


class ReplicaLoop:
    """The loop of a replica's first rank.

    Args:
        worker: this rank's worker.
        collectives: the collectives over the replica.
        socket: a DEALER that is connected to the dispatcher.
        limits: the bounds of its forwards.
        check_dispatcher: called now and then while the replica is idle; raises once the dispatcher has failed.
    """

    def __init__(
        self,
        worker: Worker,
        collectives: Collectives,
        socket: zmq.Socket[bytes],
        limits: BatchLimits,
        check_dispatcher: Callable[[], None] = lambda: None,
    ) -> None:
        self._worker = worker
        self._collectives = collectives
        self._socket = socket
        self._check_dispatcher = check_dispatcher
        self._speed, self._begin_speed, self._decode_speed = SpeedEstimate(), SpeedEstimate(), SpeedEstimate()
        self._limits = limits
        self._planner = ForwardPlanner(limits, self._speed)
        self._batch = RankBatch(worker, self._on_stage)
        self._progress: dict[tuple[PartKey, str], PartProgress] = {}  # not reported yet, as the forwards
        self._forwards: list[Forward] = []
        self._reported = 0.0
        self._arrived: dict[PartKey, Part] = {}
        self._stops: list[PartKey] = []
        self._side_s = 0.0  # the time of side work since the last forward
        self._last = False

    def run(self) -> None:
        """Run until the dispatcher says that it is the end."""
        self._report([])  # the dispatcher can reach this replica from now on
        while not self._last or self._batch.parts or self._arrived:
            self._receive(wait=not self._batch.parts and not self._arrived)
            if self._batch.parts or self._arrived:
                self._run_tick(self._plan())
        self._collectives.broadcast(msgspec.msgpack.encode(Tick(last=True)))

    def _receive(self, wait: bool) -> None:
        while wait and not self._last and not self._socket.poll(WATCH_MS):
            self._check_dispatcher()
        while has_message(self._socket):
            orders = msgspec.msgpack.decode(self._socket.recv(), type=Orders)
            begin = {part.key: part for part in orders.begin}
            self._arrived |= begin
            # a stop that came before belongs to an ended part of an earlier request with the same id
            self._stops = [key for key in self._stops if key not in begin] + orders.stops
            self._last |= orders.last

    def _plan(self) -> Tick:
        """Return the next tick: while parts wait for a forward, at most SIDE_S of side work comes before it."""
        stops, self._stops = self._stops, []
        if any(key in self._arrived for key in stops):
            begin = [self._arrived.pop(key) for key in stops if key in self._arrived]
            return Tick(begin, stops)
        going = [running for key, running in self._batch.parts.items() if key not in stops]
        # parts that have just begun wait for those that begin with them, so that they share all forwards
        waiting = [each for each in going if each.fiber.call is not None and (each.evaluations or not self._arrived)]
        paused = [each.part for each in going if each.fiber.paused]
        if (paused or self._arrived) and not (waiting and self._side_s >= SIDE_S):
            if paused:
                return Tick(stops=stops, decode=[part.key for part in self._within(paused, self._decode_speed)])
            begin = self._within(list(self._arrived.values()), self._begin_speed)
            for part in begin:
                del self._arrived[part.key]
            return Tick(begin, stops)
        self._side_s = 0.0
        return msgspec.structs.replace(self._planner.plan(waiting) if waiting else Tick(), stops=stops)

    def _within(self, parts: list[Part], speed: SpeedEstimate) -> list[Part]:
        """Return the first of some parts, as many as take the rest of SIDE_S; at least one."""
        seconds = self._side_s
        found: list[Part] = []
        for part in parts:
            expected_s = speed.expected_s(part.work, part.work)
            seconds += SIDE_S if expected_s is None else expected_s
            if found and seconds > SIDE_S:
                break
            found.append(part)
        return found

    def _run_tick(self, tick: Tick) -> None:
        by_key = {key: running.part for key, running in self._batch.parts.items()}
        works = {key: part.work for key, part in by_key.items()}
        rows = {key: _rows(self._batch.parts[key]) for key in tick.forward}
        self._collectives.broadcast(msgspec.msgpack.encode(tick))
        gathered = self._collectives.gather(self._batch.tick(tick))
        for speed, parts in (
            (self._begin_speed, {part.key: part.work for part in tick.begin}),
            (self._decode_speed, {key: works[key] for key in tick.decode}),
        ):
            for key, work in parts.items():
                speed.observe(work, work, self._batch.durations[key])
                self._side_s += self._batch.durations[key]
        if tick.forward:
            first = tick.forward[0]
            work = works[first] / rows[first] if tick.by_row else sum(works[key] for key in tick.forward)
            forward = works[first], work, self._batch.durations[first]
            self._speed.observe(*forward)
            self._forwards.append(forward)
        self._progress |= {(key, step[0]): PartProgress(key, *step) for key, step in self._batch.steps.items()}
        with_preview = [key for key, step in self._batch.steps.items() if step[3]]
        for key in with_preview:
            self._planner.charge_preview(by_key[key], self._batch.durations[key])
        has_ended = any(len(frames) > 1 for frames in gathered)
        makes_room = any(done == total for _, done, total, _ in self._batch.steps.values())
        if has_ended or with_preview or (makes_room and self._is_full(works)) or self._is_due():
            self._report(gathered)

    def _is_full(self, works: Mapping[PartKey, float]) -> bool:
        """Return whether the dispatcher may wait for room: one more default image would not fit."""
        return sum(works.values()) + self._limits.default_work > self._limits.forward_work

    def _on_stage(self, key: PartKey, stage: str) -> None:
        self._progress[key, stage] = PartProgress(key, stage)
        if self._is_due():
            self._report([])

    def _is_due(self) -> bool:
        return time.monotonic() - self._reported >= REPORT_S

    def _report(self, gathered: list[list[bytes]]) -> None:
        """Send what has ended in a tick, and the progress and the forwards since the last report.

        Args:
            gathered: what the ranks have returned from a tick.
        """
        ended = [msgspec.msgpack.decode(frames[0], type=TickReport).ended for frames in gathered]
        counter = self._worker.counter
        report = ReplicaReport(
            list(self._progress.values()), ended, counter.evaluations, counter.rows, list(self._forwards)
        )
        self._progress.clear()
        self._forwards.clear()
        self._reported = time.monotonic()
        frames = [frame for of_rank in gathered for frame in of_rank[1:]]
        self._socket.send_multipart([msgspec.msgpack.encode(report), *frames])


def follow_replica(worker: Worker, collectives: Collectives) -> None:
    """Run the loop of a replica's other ranks, until its first rank broadcasts the last tick."""
    batch = RankBatch(worker)
    while not (tick := msgspec.msgpack.decode(collectives.broadcast(None), type=Tick)).last:
        collectives.gather(batch.tick(tick))


def _rows(running: RunningPart) -> int:
    return 1 if running.fiber.call is None else len(running.fiber.call.latent)
