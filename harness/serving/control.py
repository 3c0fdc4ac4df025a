"""The control socket: a thread of rank 0 that answers ping, cancel and shutdown while work runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import msgspec
import zmq

from harness.messages import Cancel, EngineInfo, MessageError, Ping, Shutdown, encode
from harness.serving.transport import MAX_FRAMES, Addresses, decode_message, receive_bounded, rejection, reply, router

SHUTDOWN_ADDRESS = "inproc://wake"
MAX_CANCELLED = 10_000  # limits, since ids of requests that never arrive would pile up
CANCELLED_S = 60.0
log = logging.getLogger(__name__)


def shutdown_listener(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """Return the PULL socket on which the main thread receives the control thread's shutdown message."""
    shutdown_socket = context.socket(zmq.PULL)
    shutdown_socket.bind(SHUTDOWN_ADDRESS)
    return shutdown_socket


class ControlThread:
    """A thread that answers on the control address until the engine ends. The main thread writes its state.

    Args:
        context: the engine's ZeroMQ context; `shutdown` reaches the main thread as a message on SHUTDOWN_ADDRESS.
        addresses: the engine's addresses.
        info: the first answer to a ping.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], addresses: Addresses, info: EngineInfo) -> None:
        self._context = context
        self._info = info
        self._read_counter: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._cancelled: dict[str, float] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._socket = router(context, addresses.control)
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def set_info(self, info: EngineInfo) -> None:
        """Set the answer to the next ping."""
        with self._lock:
            self._info = info

    def update(self, state: str, queued: int, served: int, running: int = 0) -> None:
        """Update the state and the counts of requests in the answer to a ping."""
        with self._lock:
            self._info = msgspec.structs.replace(self._info, state=state, queued=queued, served=served, running=running)

    def set_counter(self, read_counter: Callable[[], tuple[int, int]]) -> None:
        """Set the function from which a ping reads the evaluations and rows so far."""
        with self._lock:
            self._read_counter = read_counter

    def is_cancelled(self, request_id: str) -> bool:
        """Return whether a client has cancelled this request."""
        with self._lock:
            return request_id in self._cancelled

    def forget(self, request_id: str) -> None:
        """Drop the cancellation of an answered request."""
        with self._lock:
            self._cancelled.pop(request_id, None)

    def expire(self, is_open: Callable[[str], bool]) -> None:
        """Drop the cancellations of requests that have not come within CANCELLED_S.

        Args:
            is_open: returns whether a request has arrived and has no answer.
        """
        oldest = time.monotonic() - CANCELLED_S
        with self._lock:
            old = [name for name, at in self._cancelled.items() if at < oldest and not is_open(name)]
            for name in old:
                del self._cancelled[name]

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        shutdown_socket = self._context.socket(zmq.PUSH)
        shutdown_socket.connect(SHUTDOWN_ADDRESS)
        while not self._stop.is_set():
            if not self._socket.poll(100):
                continue
            client, *frames = receive_bounded(self._socket, MAX_FRAMES)
            try:
                message = decode_message(frames)
            except MessageError as error:
                log.warning("control: %s", error)
                reply(self._socket, client, encode(rejection(error)))
                continue
            if isinstance(message, Ping):
                with self._lock:
                    evaluations, rows = self._read_counter()
                    info = msgspec.structs.replace(self._info, evaluations=evaluations, rows=rows)
                reply(self._socket, client, encode(info))
            elif isinstance(message, Cancel):
                with self._lock:
                    if len(self._cancelled) < MAX_CANCELLED:
                        self._cancelled[message.request_id] = time.monotonic()
            elif isinstance(message, Shutdown):
                shutdown_socket.send(b"shutdown")
        shutdown_socket.close(linger=0)
        self._socket.close(linger=500)
