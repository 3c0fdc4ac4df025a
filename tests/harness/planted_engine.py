"""A planted engine: a thread that speaks harness.messages on an engine's two addresses, and draws nothing."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import zmq

from harness.messages import (
    QUEUED,
    Cancel,
    EngineInfo,
    Failure,
    GenerationRequest,
    GenerationResult,
    Message,
    Ping,
    Progress,
    decode,
    encode,
)
from harness.serving.transport import Addresses, router

Script = Callable[[GenerationRequest, int], list[tuple[float, Message]]]


def drawn(request: GenerationRequest) -> GenerationResult:
    """An answer without pictures."""
    return GenerationResult(request.request_id, [], [], 1.0)


def progress(request: GenerationRequest, stage: str = QUEUED) -> Progress:
    return Progress(request.request_id, stage, 0, request.steps)


def failure(request: GenerationRequest, kind: str, retry_after_s: float | None = None) -> Failure:
    return Failure(request.request_id, kind, f"planted {kind}", retry_after_s=retry_after_s)


class Planted:
    """Answers request number k with the messages of `script(request, k)`, each so many seconds after its arrival.

    Every GenerationResult counts as `steps` evaluations of the denoiser.
    """

    def __init__(self, addresses: Addresses, script: Script) -> None:
        self.seen: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self.info = EngineInfo("ready", 1, [])
        self._script = script
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._requests = router(self._context, addresses.requests)
        self._control = router(self._context, addresses.control)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._requests, zmq.POLLIN)
        poller.register(self._control, zmq.POLLIN)
        waiting: list[tuple[float, bytes, Message]] = []
        while not self._stop.is_set():
            ready = dict(poller.poll(2))
            if self._control in ready:
                client, *frames = self._control.recv_multipart()
                message = decode(frames)
                if isinstance(message, Cancel):
                    self.cancelled.append(message.request_id)
                elif isinstance(message, Ping):
                    self._control.send_multipart([client, *encode(self.info)])
            if self._requests in ready:
                client, *frames = self._requests.recv_multipart()
                request = decode(frames)
                assert isinstance(request, GenerationRequest)
                said = self._script(request, len(self.seen))
                self.seen.append(request)
                waiting += [(time.monotonic() + after_s, client, message) for after_s, message in said]
            due = [each for each in waiting if each[0] <= time.monotonic()]
            waiting = [each for each in waiting if each not in due]
            for _, client, message in due:
                if isinstance(message, GenerationResult):
                    steps = next(r.steps for r in self.seen if r.request_id == message.request_id)
                    self.info = msgspec.structs.replace(self.info, evaluations=self.info.evaluations + steps)
                self._requests.send_multipart([client, *encode(message)])


@contextmanager
def planted(script: Script) -> Iterator[tuple[Planted, Addresses]]:
    """A planted engine while it lasts."""
    addresses = Addresses.private()
    engine = Planted(addresses, script)
    try:
        yield engine, addresses
    finally:
        engine.close()
        addresses.remove()
