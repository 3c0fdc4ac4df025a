"""The dispatcher: a thread of rank 0 that owns the clients' socket and the queue, and gives parts to the replicas.

It corresponds to SGLang's data-parallel controller. Replicas are told apart by their identity on a second ROUTER in the
private folder. All ranks of a server are on one machine.
"""

from __future__ import annotations

import logging
import math
import threading

import msgspec
import zmq

from harness.messages import DECODING
from harness.serving.control import ControlThread
from harness.serving.parts import OpenRequest, Part, PartKey
from harness.serving.policy import TrackedRequest, estimated_work, evaluation_work, next_request
from harness.serving.replica import BatchLimits, Orders, PartProgress, ReplicaReport
from harness.serving.request_queue import RequestQueue
from harness.serving.transport import has_message

OPEN_WAIT_MS = 50  # how often cancellations and deadlines are looked at
IDLE_WAIT_MS = 200
log = logging.getLogger(__name__)


class Dispatcher:
    """The thread; it ends after a client's Shutdown, once every request that has begun is answered.

    Args:
        request_queue: the queue of requests.
        control: the control thread, whose state is updated.
        socket: the ROUTER that the replicas connect to.
        replicas: the number of replicas.
        limits: the bounds of the parts that share a replica.
    """

    def __init__(
        self,
        request_queue: RequestQueue,
        control: ControlThread,
        socket: zmq.Socket[bytes],
        replicas: int,
        limits: BatchLimits,
    ) -> None:
        self._queue = request_queue
        self._control = control
        self._socket = socket
        self._limits = limits
        self._open: dict[str, OpenRequest] = {}
        self._reachable: set[int] = set()
        self._counts = [(0, 0)] * replicas
        self._served = 0
        self._seen = (0, 0)  # the requests accepted and waiting after the last assignment
        self._may_assign = False  # whether there may be more room than at the last assignment
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)
        request_queue.watch(socket)

    def start(self) -> None:
        """Start the thread; the sockets belong to it from now on."""
        self._control.set_counter(lambda: (sum(c[0] for c in self._counts), sum(c[1] for c in self._counts)))
        self._publish_state()
        self._thread.start()

    def check(self) -> None:
        """Raise what has ended the thread, if anything has.

        Raises:
            RuntimeError: the thread has failed.
        """
        if self._error is not None:
            raise RuntimeError(f"the dispatcher failed: {self._error}") from self._error

    def close(self) -> None:
        """End the thread. What waits is not answered, unless a client has asked the engine to end."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set() and (self._open or not self._queue.shutting_down):
                self._queue.poll(len(self._open), OPEN_WAIT_MS if self._open or self._queue.queue else IDLE_WAIT_MS)
                self._receive_reports()
                self._stop_parts()
                if self._may_assign or (self._queue.accepted, len(self._queue.queue)) != self._seen:
                    self._assign_parts()
                self._answer()
            if self._stop.is_set():  # this rank has failed; other ranks may yet serve what waits
                return
            self._control.update("stopping", len(self._queue.queue), self._served)
            self._queue.close()
            for replica in self._reachable:
                self._send(replica, Orders(last=True))
        except Exception as error:
            log.exception("the dispatcher failed")
            self._error = error

    def _publish_state(self) -> None:
        running = len(self._open)
        self._control.update("busy" if running else "ready", len(self._queue.queue), self._served, running)

    def _receive_reports(self) -> None:
        while has_message(self._socket):
            identity, header, *frames = self._socket.recv_multipart()
            replica, report = int(identity), msgspec.msgpack.decode(header, type=ReplicaReport)
            self._may_assign |= replica not in self._reachable or any(report.ended)
            self._reachable.add(replica)
            self._counts[replica] = report.evaluations, report.rows
            for forward in report.forwards:
                self._queue.capacity.speed.observe(*forward)
            for progress in report.progress:
                self._send_progress(progress)
            for key, outcomes in split_outcomes(report, frames).items():
                request = self._open[key[0]]
                request.on_outcome(key[1], outcomes)
                if request.images_done:
                    self._queue.send_progress(request.tracked, DECODING, *request.images_done)

    def _send_progress(self, progress: PartProgress) -> None:
        request = self._open[progress.key[0]]
        found = request.on_progress(progress.key[1], progress.stage, progress.done, progress.total)
        self._may_assign |= progress.key[1] in request.denoised
        if found is not None:
            self._queue.send_progress(request.tracked, *found, progress.preview)

    def _stop_parts(self) -> None:
        """Stop the parts of requests that were cancelled, have expired or have failed in another part."""
        for request_id, request in self._open.items():
            reason = None if request.stopped else self._queue.stop_reason(request.tracked)
            if reason is None and not request.failed:
                continue
            if not request.stopped:
                request.stopped = True
                for index, replica in request.replicas.items():
                    self._send(replica, Orders(stops=[(request_id, index)]))

    def _assign_parts(self) -> None:
        """Give parts to replicas by turns. A request that has no room does not keep others from their first part."""
        self._may_assign = False
        blocked_clients: set[str] = set()
        blocked_requests: set[str] = set()
        begin: dict[int, list[Part]] = {}
        while (tracked := self._next(blocked_clients, blocked_requests)) is not None:
            replica = self._room_for(tracked, first_only=bool(blocked_clients or blocked_requests))
            request_id = tracked.request.request_id
            if replica is None and request_id in self._open:
                blocked_requests.add(request_id)
                continue
            if replica is None:
                blocked_clients.add(tracked.turn)
                continue
            if request_id not in self._open:
                self._queue.queue.remove(tracked)
                self._open[request_id] = OpenRequest(tracked)
            part = self._open[request_id].take(replica)
            self._queue.charge(tracked, estimated_work(part.request))
            begin.setdefault(replica, []).append(part)
        for replica, parts in begin.items():  # in one message, so that they begin together
            self._send(replica, Orders(parts))
        self._seen = self._queue.accepted, len(self._queue.queue)
        self._publish_state()

    def _next(self, blocked_clients: set[str], blocked_requests: set[str]) -> TrackedRequest | None:
        """Return the request whose part is next: one with parts left, or one of the queue.

        Within a client, what has begun goes first, whatever the policy: else it might wait for as long as others come.
        """
        with_left = {request_id: request for request_id, request in self._open.items() if request.has_left}
        waiting = [request.tracked for name, request in with_left.items() if name not in blocked_requests]
        if not self._queue.shutting_down:
            waiting += self._queue.queue
        waiting = [tracked for tracked in waiting if tracked.turn not in blocked_clients]

        def key(tracked: TrackedRequest) -> float:
            return -math.inf if tracked.request.request_id in self._open else self._queue.key(tracked)

        return next_request(waiting, self._queue.turns, key)

    def _room_for(self, tracked: TrackedRequest, first_only: bool) -> int | None:
        """Return the replica for a part of a request, or None if it has to wait.

        A replica has room up to the work of one forward. Beyond that, a client may have its first part in progress,
        and a request its first part if every replica has the parts of one single request. Forwards are made in turns.
        """
        if len(self._reachable) < len(self._counts):  # the first request is for all replicas, too
            return None
        load = dict.fromkeys(sorted(self._reachable), 0.0)
        requests: dict[int, list[str]] = {replica: [] for replica in load}
        for request_id, request in self._open.items():
            for index, replica in request.replicas.items():
                requests[replica].append(request_id)
                if index not in request.denoised:  # another one begins while it decodes, and has the next forward
                    load[replica] += evaluation_work(request.tracked.request)
        with_place = [replica for replica in load if len(requests[replica]) < self._limits.max_parts]
        if not with_place:
            return None
        work, request_id = evaluation_work(tracked.request), tracked.request.request_id
        best = min(with_place, key=lambda replica: load[replica])
        fits = load[best] == 0 or load[best] + work <= self._limits.forward_work
        clients = {request.tracked.turn for request in self._open.values() if request.replicas}
        if tracked.turn not in clients or (fits and not first_only):
            return best
        each_has_one = all(len(set(on_replica)) == 1 for on_replica in requests.values())
        open_request = self._open.get(request_id)
        is_first = open_request is None or not open_request.replicas
        return best if each_has_one and is_first else None

    def _answer(self) -> None:
        """Answer the requests that have ended."""
        ended = {name: request for name, request in self._open.items() if request.is_done}
        for name in ended:
            del self._open[name]
        self._served += len(ended)
        if ended:
            self._publish_state()  # before the client has its answer and can ask
        for request in ended.values():
            tracked = request.tracked
            self._queue.respond(tracked, self._queue.with_stop_reason(tracked, request.answer()))

    def _send(self, replica: int, orders: Orders) -> None:
        self._socket.send_multipart([str(replica).encode(), msgspec.msgpack.encode(orders)])


def split_outcomes(report: ReplicaReport, frames: list[bytes]) -> dict[PartKey, list[list[bytes]]]:
    """Return the outcomes of a report by part: the frames of a RankOutcome of every rank of the replica."""
    outcomes: dict[PartKey, list[list[bytes]]] = {}
    for of_rank in report.ended:
        for key, size in of_rank:
            outcomes.setdefault(key, []).append(frames[:size])
            frames = frames[size:]
    return outcomes
