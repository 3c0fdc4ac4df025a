"""The control socket: a thread of rank 0 that answers ping, cancel and shutdown while work runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import msgspec
import zmq

from harness.messages import Cancel, EngineInfo, MessageError, Ping, Shutdown, decode, encode
from harness.serving.transport import Addresses, rejection, reply, router

WAKE = "inproc://wake"
MAX_CANCELLED = 10_000  # ids of requests that never come would pile up otherwise
log = logging.getLogger(__name__)


def listener(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """Where the main thread hears that the engine shall end."""
    wake = context.socket(zmq.PULL)
    wake.bind(WAKE)
    return wake


class ControlThread:
    """Answers on the control address until the engine ends. State is written by the main thread, read by this one.

    Args:
        context: the engine's ZeroMQ context; `shutdown` reaches the main thread as a message on WAKE.
        addresses: where to listen.
        info: what a ping is answered with first.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], addresses: Addresses, info: EngineInfo) -> None:
        self._context = context
        self._info = info
        self._counted: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._socket = router(context, addresses.control)
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def set_info(self, info: EngineInfo) -> None:
        """What the next ping is answered with."""
        with self._lock:
            self._info = info

    def update(self, state: str, queued: int, served: int, running: int = 0) -> None:
        """Changes what a ping is answered with."""
        with self._lock:
            self._info = msgspec.structs.replace(self._info, state=state, queued=queued, served=served, running=running)

    def watch(self, counted: Callable[[], tuple[int, int]]) -> None:
        """Where a ping finds the evaluations and their rows so far."""
        with self._lock:
            self._counted = counted

    def is_cancelled(self, request_id: str) -> bool:
        """Whether a client has cancelled this request."""
        with self._lock:
            return request_id in self._cancelled

    def forget(self, request_id: str) -> None:
        """Drops what is remembered of an answered request."""
        with self._lock:
            self._cancelled.discard(request_id)

    def close(self) -> None:
        """Stops the thread."""
        self._stop.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        wake = self._context.socket(zmq.PUSH)
        wake.connect(WAKE)
        while not self._stop.is_set():
            if not self._socket.poll(100):
                continue
            client, *frames = self._socket.recv_multipart()
            try:
                message = decode(frames)
            except MessageError as error:
                log.warning("control: %s", error)
                reply(self._socket, client, encode(rejection(error)))
                continue
            if isinstance(message, Ping):
                with self._lock:
                    evaluations, rows = self._counted()
                    info = msgspec.structs.replace(self._info, evaluations=evaluations, rows=rows)
                reply(self._socket, client, encode(info))
            elif isinstance(message, Cancel):
                with self._lock:
                    if len(self._cancelled) < MAX_CANCELLED:
                        self._cancelled.add(message.request_id)
            elif isinstance(message, Shutdown):
                wake.send(b"shutdown")
        wake.close(linger=0)
        self._socket.close(linger=500)
