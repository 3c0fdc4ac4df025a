"""A request may have the id of an earlier one that has its answer, also after a cancellation."""

from __future__ import annotations

import msgspec
import zmq

from harness.messages import Failure, GenerationResult, RankOutcome, decode
from harness.parallel.collectives import LocalCollectives
from harness.serving.parts import Part
from harness.serving.policy import evaluation_work
from harness.serving.replica import BatchLimits, Orders, ReplicaLoop, ReplicaReport
from harness.serving.request_scheduler import RequestScheduler
from tests.fixtures.serving.toy_replicas import RecordingDecoder, RecordingNetwork, toy_request, toy_worker
from tests.fixtures.toy_pipeline import ToyEncoder


class Flags:
    """Cancel flags that every rank reads, in a set."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.seen: list[str] = []

    def set(self, request_id: str) -> None:
        self.ids.add(request_id)
        self.seen.append(request_id)

    def is_set(self, request_id: str) -> bool:
        return request_id in self.ids

    def clear(self, request_id: str) -> None:
        self.ids.remove(request_id)


def test_a_cancellation_does_not_reach_the_next_request_of_the_same_id() -> None:
    worker = toy_worker(0, 1, RecordingNetwork(), RecordingDecoder(), ToyEncoder())
    flags = Flags()
    scheduler = RequestScheduler(worker, LocalCollectives(), flags)
    answers = [
        decode(scheduler.run_request(toy_request("a"), lambda stage, done, total: None, is_cancelled))
        for is_cancelled in (lambda: True, lambda: flags.is_set("a"))
    ]
    assert isinstance(answers[0], Failure)
    assert isinstance(answers[1], GenerationResult)
    assert flags.seen == ["a"]


def test_a_late_stop_does_not_reach_the_next_part_of_the_same_name() -> None:
    """The dispatcher stops a part whose end it has not read yet, and the next orders begin one of that name."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    own, dispatcher = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    own.bind("inproc://replica")
    dispatcher.connect("inproc://replica")
    part = Part(toy_request("a"), 0, "client")
    for orders in (Orders(stops=[part.key]), Orders(begin=[part]), Orders(last=True)):
        dispatcher.send(msgspec.msgpack.encode(orders))
    worker = toy_worker(0, 1, RecordingNetwork(), RecordingDecoder(), ToyEncoder())
    ReplicaLoop(worker, LocalCollectives(), own, BatchLimits(4, evaluation_work(part.request))).run()
    frames: list[bytes] = []
    while dispatcher.poll(0):
        header, *rest = dispatcher.recv_multipart()
        frames += rest if any(msgspec.msgpack.decode(header, type=ReplicaReport).ended) else []
    context.destroy(linger=0)
    outcome = decode(frames)
    assert isinstance(outcome, RankOutcome)
    assert outcome.failure is None
