"""Sockets: a ROUTER on rank 0, DEALERs at the clients, over private ipc:// addresses; frames as in harness.messages.

An engine has two addresses: requests (which queue while work runs) and control (answered at once, by a thread of its
own).
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import zmq

from harness.messages import Cancel, EngineInfo, Failure, Message, MessageError, Ping, Shutdown, decode, encode
from harness.resolve.limits import MAX_PROMPT_CHARS

MAX_FRAMES = 2  # a client's message is its identity and one header, until requests have input images
HEADER_BYTES = 1 << 16  # all of a request apart from its prompts
CONTROL_BYTES = 1 << 16
MAX_CLIENT_MESSAGES = 100  # a client's unread messages beyond this wait in its own process
DealerT = TypeVar("DealerT", bound=zmq.Socket[Any])  # a thread's socket or asyncio's
MAX_QUEUED = 1000
MAX_SOCKET_PATH_BYTES = 103  # sun_path has 108 with its final zero on Linux, 104 on macOS and the BSDs


class SocketFolderError(ValueError):
    """No folder can hold the engine's sockets; the message says what to change."""


@dataclass(frozen=True)
class Addresses:
    """The addresses of one engine, in a folder of sockets."""

    folder: Path

    @property
    def requests(self) -> str:
        """The ROUTER for GenerationRequests."""
        return f"ipc://{self.folder}/requests"

    @property
    def control(self) -> str:
        """The ROUTER for Ping, Cancel and Shutdown."""
        return f"ipc://{self.folder}/control"

    @property
    def replicas(self) -> str:
        """The ROUTER of the dispatcher for the first rank of every replica."""
        return f"ipc://{self.folder}/replicas"

    @classmethod
    def private(cls) -> Addresses:
        """Return addresses in a new folder that only this user can enter (mode 0700).

        It is in the temporary folder (TMPDIR), or in another one if a socket's path would be too long there.

        Raises:
            SocketFolderError: No folder that can be written has a path short enough.
        """
        tried = [os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/var/tmp", "/dev/shm"]
        with suppress(FileNotFoundError):  # no temporary folder can be written
            tried.insert(0, tempfile.gettempdir())
        for parent in tried:
            longest = os.path.join(parent, "triptych-12345678", "requests")
            if not os.path.isabs(parent) or len(os.fsencode(longest)) > MAX_SOCKET_PATH_BYTES:
                continue
            with suppress(OSError):
                return cls(Path(tempfile.mkdtemp(prefix="triptych-", dir=parent)))
        raise SocketFolderError(
            f"no folder for sockets: the path of one has at most {MAX_SOCKET_PATH_BYTES} bytes, and none of "
            f"{', '.join(parent for parent in tried if parent)} can be used; set TMPDIR to a short path that you can "
            "write"
        )

    def remove(self) -> None:
        """Remove the folder and its sockets."""
        shutil.rmtree(self.folder, ignore_errors=True)


def max_request_bytes(max_images: int) -> int:
    """Return the largest header of a legal request: a prompt for each image and a negative one, in UTF-8."""
    return HEADER_BYTES + 4 * MAX_PROMPT_CHARS * (max_images + 1)


def router(
    context: zmq.Context[zmq.Socket[bytes]], address: str, max_frame_bytes: int = CONTROL_BYTES
) -> zmq.Socket[bytes]:
    """Return a bound ROUTER for clients.

    It raises EHOSTUNREACH for a client that it cannot reach, and queues any number of messages for a slow client.
    ZeroMQ disconnects a client that sends a larger frame. It ignores a client whose identity another one has.

    Args:
        context: the ZeroMQ context.
        address: the address to bind.
        max_frame_bytes: the largest frame that it receives.
    """
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, MAX_CLIENT_MESSAGES)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
    socket.bind(address)
    return socket


def replica_router(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    """Return a bound ROUTER for the replicas of the same engine, whose frames hold images of any size."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.bind(address)
    return socket


def has_message(socket: zmq.Socket[bytes]) -> bool:
    """Return whether a message can be received at once; `Socket.poll(0)` makes a poller each time."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


def receive_bounded(socket: zmq.Socket[bytes], max_frames: int) -> list[bytes]:
    """Receive one message of a client; of a longer one, one frame more than allowed is kept and the rest is dropped."""
    frames = [socket.recv()]
    while socket.getsockopt(zmq.RCVMORE):
        frame = socket.recv()
        if len(frames) <= max_frames:
            frames.append(frame)
    return frames


def decode_message(frames: list[bytes]) -> Message:
    """Return the message in the frames that a client sent after its identity.

    Args:
        frames: what `receive_bounded` has kept.

    Raises:
        MessageError: the frames are no message, or there are too many.
    """
    if len(frames) >= MAX_FRAMES:
        raise MessageError(f"a message of more than {MAX_FRAMES - 1} frame; an engine takes a header alone")
    return decode(frames)


def reply(socket: zmq.Socket[bytes], client: bytes, frames: list[bytes]) -> bool:
    """Send an answer to a client of a ROUTER, and return whether the client is still connected."""
    try:
        socket.send_multipart([client, *frames])
    except zmq.ZMQError as error:
        if error.errno != zmq.EHOSTUNREACH:
            raise
        return False
    return True


def dealer(context: zmq.Context[DealerT], address: str, max_queued: int = MAX_QUEUED, identity: bytes = b"") -> DealerT:
    """Return a connected DEALER; messages sent before the engine listens wait in its queue.

    Args:
        context: the ZeroMQ context.
        address: the engine's address.
        max_queued: the largest number of queued messages; 0 for no limit, so that sending never waits.
        identity: the name by which the ROUTER knows it; empty for one that no other client has.
    """
    socket = context.socket(zmq.DEALER)
    if identity:
        socket.setsockopt(zmq.IDENTITY, identity)
    socket.set_hwm(max_queued)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)
    return socket


class EngineGone(RuntimeError):
    """The engine stopped answering, or died.

    Args:
        message: the reason, in one line.
        kind: failed, oom or unsupported.
        from_outside: whether somebody else killed a rank: it ended by SIGKILL, and memory had not run out.
    """

    def __init__(self, message: str, kind: str = "failed", from_outside: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.from_outside = from_outside


class Connection:
    """A client's two sockets to one engine.

    Args:
        addresses: the engine's addresses.
        check_alive: a function called between polls that raises EngineGone with the reason if the engine is dead.
    """

    POLL_MS = 200

    def __init__(self, addresses: Addresses, check_alive: Callable[[], None] = lambda: None) -> None:
        self._context = zmq.Context()
        self._addresses = addresses
        self._requests: zmq.Socket[bytes] | None = None
        self._control = dealer(self._context, addresses.control)
        self._check_alive = check_alive
        self._max_request_bytes = 0

    def send(self, message: Message) -> None:
        """Queue a message on the request socket.

        Raises:
            MessageError: the engine takes no message of this size.
        """
        frames = encode(message)
        if 0 < self._max_request_bytes < len(frames[0]):
            raise MessageError(
                f"a request of {len(frames[0])} bytes, this engine takes {self._max_request_bytes}; shorten the prompts"
            )
        self._request_socket().send_multipart(frames)

    def receive(self) -> tuple[Message, list[bytes]]:
        """Return the next message of the request socket, with its frames.

        Raises:
            EngineGone: the engine died first.
        """
        socket = self._request_socket()
        while not socket.poll(self.POLL_MS):
            self._check_alive()
        frames = socket.recv_multipart()
        return decode(frames), frames

    def receive_within(self, timeout_s: float) -> Message | None:
        """Return the next message of the request socket without its arrays, or None if none arrives in time.

        Args:
            timeout_s: the time limit in seconds; one poll of POLL_MS is the longest wait.

        Raises:
            EngineGone: the engine died first.
        """
        socket = self._request_socket()
        if socket.poll(min(self.POLL_MS, max(0, math.ceil(1e3 * min(timeout_s, 1.0))))):
            return decode(socket.recv_multipart())
        self._check_alive()
        return None

    def ping(self, timeout_s: float = 1.0) -> EngineInfo | None:
        """Return the engine's state, or None if it does not answer in time."""
        self._drain()
        with suppress(zmq.Again):  # the queue is full of unanswered pings
            self._control.send_multipart(encode(Ping()), zmq.NOBLOCK)
        deadline = time.monotonic() + timeout_s
        while self._control.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            answer = decode(self._control.recv_multipart())
            if isinstance(answer, EngineInfo):
                self._max_request_bytes = answer.max_request_bytes
                return answer
        return None

    def wait_ready(
        self, timeout_s: float, on_wait: Callable[[EngineInfo | None], None] = lambda info: None
    ) -> EngineInfo:
        """Wait until every rank has loaded.

        Args:
            timeout_s: the time limit in seconds.
            on_wait: a callback that receives the engine's state while it loads.

        Returns:
            The engine's state.

        Raises:
            EngineGone: the engine died, or was not ready in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self._check_alive()
            info = self.ping(self.POLL_MS / 1000)
            if info is not None and info.state in ("ready", "busy"):
                return info
            on_wait(info)
            if info is not None:
                time.sleep(0.02)
        raise EngineGone(
            f"the engine was not ready within {timeout_s:g} s; raise launch.start_timeout_s or read its logs"
        )

    def cancel(self, request_id: str) -> None:
        """Ask the engine to stop a request; its answer is then a Failure of kind cancelled."""
        self._control.send_multipart(encode(Cancel(request_id)))

    def shutdown(self) -> None:
        """Ask the engine to end in order."""
        self._control.send_multipart(encode(Shutdown()))

    def close(self) -> None:
        """Close both sockets; control messages that were not sent within half a second are dropped."""
        if self._requests is not None:
            self._requests.close(linger=0)
        self._control.close(linger=500)
        self._context.term()

    def _request_socket(self) -> zmq.Socket[bytes]:
        """Return the request socket, connected at its first use.

        A socket that connects before the engine listens retries only every 100 ms.
        """
        if self._requests is None:
            self._requests = dealer(self._context, self._addresses.requests, max_queued=0)
        return self._requests

    def _drain(self) -> None:
        while self._control.poll(0):
            self._control.recv_multipart()


def rejection(error: MessageError) -> Failure:
    """Return the answer to frames that are no message."""
    return Failure("", "rejected", str(error))
