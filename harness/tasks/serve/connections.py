"""Bounds on connections, which uvicorn has not: how many there are, how slow they may be, what is kept for them.

A connection is in one of these conditions; each has its end:

    idle       no whole request in flight: closed by uvicorn after KEEP_ALIVE_S, or for a new connection when there are
               too many; after the idle ones those go whose answer has begun, such as event streams
    head       a part of a request's line and headers has come, or nothing since the start: serve.head_timeout_s
    in flight  the application works; it bounds the time of the body and of the answer itself
    unread     the client does not read its answer: serve.reader_timeout_s, serve.max_unsent_mib over all connections
    lingering  the answer refuses a request that is still coming: LINGER_S and LINGER_BYTES, so that it can be read
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import resource
import socket
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from harness.config.serve import ServeConfig
from harness.tasks.serve.access import address_group, is_loopback
from harness.tasks.serve.middleware import too_large_head
from harness.tasks.serve.problem import STATUS, Problem

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # longer than clients keep an idle connection (httpx 5 s): the side that closes first loses nothing
CLOSE_S = 5  # the time for connections to close, once every request has its answer
HEAD_SLICE = 4096  # bytes of a head that are parsed at once, so that a long one is refused before it is parsed
READ_BYTES = 2048  # read at once: chunks of one byte each take a millisecond for 60 of them, and others wait so long
MAX_FRAMING_BYTES = 4096  # by which a chunked body may be longer than twice what is in its chunks
LINGER_S = 1.0
LINGER_BYTES = 262_144
MIN_READ_BYTES = 16_384  # a client that reads less than this in serve.reader_timeout_s counts as one that reads nothing
SEND_BUFFER_BYTES = 262_144  # of the kernel, which would keep megabytes for each slow reader otherwise
RESERVED_DESCRIPTORS = 256  # for ranks, logs, images being written, and sockets of ZeroMQ
SWEEP_TICKS = 5  # between two sweeps; uvicorn ticks every 0.1 s
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def raise_descriptor_limit() -> int:
    """Raise this process's limit of open files to the most that it may have.

    Returns:
        The limit.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def connection_bound(serve: ServeConfig, descriptors: int) -> int:
    """Return how many connections may be open.

    Args:
        serve: The server's configuration.
        descriptors: The limit of open files; each connection may need one more, for the file that it downloads.
    """
    return max(8, min(serve.max_connections, (descriptors - RESERVED_DESCRIPTORS) // 2))


class ConnectionTable:
    """The open connections of a server.

    Args:
        serve: The server's configuration.
        bound: The number of connections that may be open.
    """

    def __init__(self, serve: ServeConfig, bound: int) -> None:
        self.serve = serve
        self.bound = bound
        self._open: dict[BoundedProtocol, str] = {}  # with the address by which each is counted
        self._idle: dict[BoundedProtocol, None] = {}  # the one that is idle for the longest time first
        self._by_address: Counter[str] = Counter()

    def __len__(self) -> int:
        """Return the number of open connections."""
        return len(self._open)

    def add(self, protocol: BoundedProtocol, address: str) -> bool:
        """Add a new connection; the oldest idle one is closed if there are too many.

        Args:
            protocol: The connection.
            address: The client's address.

        Returns:
            Whether there is room.
        """
        group = address_group(address)
        crowded = self._by_address[group] >= self.serve.max_connections_per_address and not is_loopback(address)
        if (crowded and not self.make_room(group)) or (len(self) >= self.bound and not self.make_room()):
            return False
        self._open[protocol] = group
        self._by_address[group] += 1
        self._idle[protocol] = None
        return True

    def remove(self, protocol: BoundedProtocol) -> None:
        """Remove a connection that is closed; a second call does nothing."""
        self._idle.pop(protocol, None)
        group = self._open.pop(protocol, None)
        if group is not None:
            self._by_address[group] -= 1
            self._by_address += Counter()  # drops addresses without connections

    def set_idle(self, protocol: BoundedProtocol, idle: bool) -> None:
        """Record whether a connection has no whole request in flight; the latest to become idle is closed last."""
        if not idle:
            self._idle.pop(protocol, None)
        elif protocol in self._open and protocol not in self._idle:
            self._idle[protocol] = None

    def make_room(self, group: str | None = None) -> bool:
        """Close one connection, of one address or of all.

        It is the one that is idle for the longest time, or else the oldest whose answer has begun. A client that waits
        for its answer keeps its connection.

        Args:
            group: The address, as `address_group` returns it; None for any.

        Returns:
            Whether there was one to close.
        """
        dispensable = itertools.chain(self._idle, (p for p in self._open if p.answering))
        found = next((p for p in dispensable if group in (None, self._open[p])), None)
        if found is not None:
            found.abort("there were too many, and this one was idle or in the middle of its answer")
        return found is not None

    def sweep(self, now: float) -> None:
        """Close the connections whose time is over.

        Args:
            now: The time of the event loop, seconds.
        """
        for protocol in list(self._open):
            protocol.check(now)
        self.limit_unsent()

    def limit_unsent(self) -> None:
        """Close the slowest readers while more than `serve.max_unsent_mib` waits for all of them."""
        unread = sorted((p for p in self._open if p.unsent), key=lambda p: p.unread_since)
        excess = sum(protocol.unsent for protocol in unread) - self.serve.max_unsent_mib * 2**20
        for protocol in unread:
            if excess <= 0:
                return
            excess -= protocol.unsent
            protocol.abort("answers wait for slow readers beyond serve.max_unsent_mib")


class LingeringTransport:
    """A transport that reads on for a moment after its end, if the client is still sending.

    A socket that is closed with unread bytes resets the connection, and the client would lose the answer.

    Args:
        transport: The transport of the socket.
        protocol: The protocol of the connection.
    """

    def __init__(self, transport: asyncio.Transport, protocol: BoundedProtocol) -> None:
        self._transport = transport
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the transport."""
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Return whether nothing more may be written."""
        return self._protocol.lingering or self._transport.is_closing()

    def close(self) -> None:
        """Close the connection, at once or after a moment."""
        if self._transport.is_closing() or not self._protocol.linger():
            self._transport.close()
        else:
            self._transport.write_eof()
            self._transport.resume_reading()


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with bounds.

    Attributes:
        lingering: Whether the connection only waits for the client to read the last answer.
        unread_since: The time since which the client reads too little of its answers.
    """

    table: ConnectionTable  # set by the class that `protocol_of` makes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept a connection, or refuse it if there are too many."""
        plain = cast(asyncio.Transport, transport)
        super().connection_made(cast(asyncio.Transport, LingeringTransport(plain, self)))
        self._plain = plain
        self.lingering = False
        self.unread_since = self._head_since = self.loop.time()
        self._receiving_head = True
        self._lingered = self._framing = 0
        self._least_unsent = 0
        cast(Any, plain).max_size = READ_BYTES  # of asyncio's transports, 256 KiB otherwise
        opened = plain.get_extra_info("socket")
        if opened is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if not self.table.add(self, self.client[0] if self.client else ""):
            log.warning("a connection was refused: the clients of all that may be open wait for an answer")
            self._answer(Problem("busy", "too many connections; close some, or try again later"))
            plain.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection that is closed."""
        self.table.remove(self)
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse bytes of the client, in small parts until the head of a request is complete."""
        if self.lingering:
            self._lingered += len(data)
            if self._lingered > LINGER_BYTES:
                self._plain.abort()
            return
        self._unset_keepalive_if_required()
        while data and not self.transport.is_closing():
            size = HEAD_SLICE if self.conn.their_state is h11.IDLE else len(data)
            in_body = self.conn.their_state is h11.SEND_BODY
            before = len(self.cycle.body) if in_body else 0
            self.conn.receive_data(data[:size])
            self.handle_events()
            self._framing += len(data[:size]) - 2 * (len(self.cycle.body) - before) if in_body else -self._framing
            if self._framing > MAX_FRAMING_BYTES and self.conn.their_state is h11.SEND_BODY:
                self._refuse(Problem("rejected", "the body comes in chunks that are too small; send it in larger ones"))
            data = data[size:]
        self._update()

    def on_response_complete(self) -> None:
        """Wait for the next request of the connection."""
        super().on_response_complete()
        self._update()

    def pause_writing(self) -> None:
        """Wait with the rest of an answer until the client reads; others may have to go for it."""
        super().pause_writing()
        self.table.limit_unsent()

    def _update(self) -> None:
        """Record in which condition the connection is."""
        idle = self.cycle is None or self.cycle.response_complete
        self.table.set_idle(self, idle or self.conn.their_state is h11.SEND_BODY)
        begun = idle and bool(self.conn.trailing_data[0])
        if begun and not self._receiving_head:
            self._head_since = self.loop.time()
        self._receiving_head = begun or (idle and self.cycle is None)

    @property
    def answering(self) -> bool:
        """Whether an answer has begun and not ended."""
        return self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete

    @property
    def unsent(self) -> int:
        """The bytes of answers that the client has not read, without those in the kernel."""
        return self._plain.get_write_buffer_size()

    def check(self, now: float) -> None:
        """Close the connection if the time of its condition is over.

        Args:
            now: The time of the event loop, seconds.
        """
        serve, unsent = self.table.serve, self.unsent
        if not unsent or not self._least_unsent or unsent <= self._least_unsent - MIN_READ_BYTES:
            self._least_unsent, self.unread_since = unsent, now
        if unsent and now - self.unread_since > serve.reader_timeout_s:
            self.abort("a client does not read its answer (serve.reader_timeout_s)")
        elif self.lingering and not unsent and now - self._linger_since > LINGER_S:
            self._plain.abort()
        elif self._receiving_head and not self.lingering and now - self._head_since > serve.head_timeout_s:
            log.warning("a connection sent no whole request in serve.head_timeout_s")
            if self.conn.trailing_data[0]:
                limit = f"within {serve.head_timeout_s:g} s; send them again"
                self._refuse(Problem("expired", f"the request's line and headers did not arrive {limit}"))
            else:
                self._plain.close()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not a request, in the form of all errors."""
        if len(self.conn.trailing_data[0]) > 1024 * self.table.serve.max_head_kib:
            self._refuse(too_large_head(self.table.serve))
        else:
            self._refuse(Problem("rejected", "this is not an HTTP/1.1 request; send one"))

    def _refuse(self, problem: Problem) -> None:
        """Answer with an error if nothing was answered yet, and close the connection."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:  # the application hears that its client is gone
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not (answering and self.cycle.response_started):
            self._answer(problem)
        self.transport.close()

    def _answer(self, problem: Problem) -> None:
        response = problem.response(uuid.uuid4().hex, close=True)
        lines = [f"HTTP/1.1 {STATUS[problem.code]} ".encode(), *(b"%s: %s" % item for item in response.raw_headers)]
        self._plain.write(b"\r\n".join([*lines, b"", bytes(response.body)]))

    def linger(self) -> bool:
        """Begin to linger if a part of the request is still to come, and return whether it does."""
        if self.conn.their_state not in (h11.ERROR, h11.SEND_BODY) and not self.conn.trailing_data[0]:
            return False
        self.lingering, self._linger_since = True, self.loop.time()
        self.table.set_idle(self, True)
        return True

    def shutdown(self) -> None:
        """Close the connection after its answer, or at once if there is none to come."""
        if self.lingering:
            self._plain.abort()
            return
        try:
            super().shutdown()
        except h11.LocalProtocolError:
            self._plain.abort()

    def abort(self, reason: str) -> None:
        """Close the connection without waiting for what is unsent."""
        log.warning("a connection was closed: %s", reason)
        self.table.remove(self)
        self._plain.abort()


def protocol_of(connections: ConnectionTable) -> type[BoundedProtocol]:
    """Return the protocol class of one server: uvicorn wants a class, and makes one instance a connection."""

    class ServerProtocol(BoundedProtocol):
        table = connections

    return ServerProtocol


class BoundedServer(uvicorn.Server):
    """uvicorn with bounds on its connections, and without signal handlers of its own.

    Its handlers would close connections before their requests are answered. Its accept loop fills the log if there are
    too many open files.

    Args:
        app: The application.
        serve: The server's configuration.
        descriptors: The limit of open files.
    """

    def __init__(self, app: ASGIApp, serve: ServeConfig, descriptors: int) -> None:
        self.table = ConnectionTable(serve, connection_bound(serve, descriptors))
        self._protocol = protocol_of(self.table)
        settings = uvicorn.Config(
            app,
            http=self._protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # any client could write them, and choose its own address
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=CLOSE_S,
            h11_max_incomplete_event_size=1024 * serve.max_head_kib,
        )
        super().__init__(settings)
        self._accepting: list[asyncio.Task[None]] = []
        if self.table.bound < serve.max_connections:
            log.warning(
                "%d connections at a time, not serve.max_connections=%d: the limit of open files (ulimit -n) is %d",
                self.table.bound,
                serve.max_connections,
                descriptors,
            )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signal handlers of this process unchanged."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections on listening sockets."""
        await self.lifespan.startup()
        self.servers = []
        self._accepting = [asyncio.create_task(self._accept(listening)) for listening in sockets or ()]
        self.started = True

    async def _accept(self, listening: socket.socket) -> None:
        """Accept one connection after another, so that their bound is exact; a failure waits a moment."""
        loop = asyncio.get_running_loop()
        listening.setblocking(False)
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError as error:
                log.warning("a connection could not be accepted: %s", error.strerror)
                if error.errno in NO_DESCRIPTORS:
                    self.table.make_room()
                await asyncio.sleep(0.1)
                continue
            try:
                await loop.connect_accepted_socket(self._make_protocol, accepted)
            except OSError as error:
                log.warning("a connection could not be opened: %s", error.strerror)
                accepted.close()

    def _make_protocol(self) -> asyncio.Protocol:
        return self._protocol(self.config, self.server_state, {})

    async def on_tick(self, counter: int) -> bool:
        """Close the connections whose time is over, twice a second."""
        if counter % SWEEP_TICKS == 0:
            self.table.sweep(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, and close the open ones."""
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        await super().shutdown(sockets)
