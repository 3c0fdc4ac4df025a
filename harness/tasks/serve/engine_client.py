"""An asyncio client of one engine: what harness.serving.transport.Connection is to a thread."""

from __future__ import annotations

import asyncio

import zmq
import zmq.asyncio

from harness.messages import Cancel, EngineInfo, GenerationRequest, Message, Ping, decode, encode
from harness.serving.transport import Addresses, dealer

ARRIVE_MS = 200  # what a dead process has written is still read from its socket


class Link:
    """Two sockets to an engine that listens already.

    Args:
        addresses: the engine's.
    """

    def __init__(self, addresses: Addresses) -> None:
        self._context = zmq.asyncio.Context()
        self._requests = dealer(self._context, addresses.requests)
        self._control = dealer(self._context, addresses.control)

    def send(self, request: GenerationRequest) -> None:
        """Queues a request."""
        self._requests.send_multipart(encode(request))

    def cancel(self, request_id: str) -> None:
        """Asks the engine to stop a request; it answers with a Failure of kind cancelled."""
        self._control.send_multipart(encode(Cancel(request_id)))

    async def receive(self) -> tuple[Message, list[bytes]]:
        """The next message about a request, with its frames.

        Raises:
            MessageError: frames that are no message.
        """
        frames: list[bytes] = await self._requests.recv_multipart()
        return decode(frames), frames

    async def left(self) -> bool:
        """Whether there is a message that was not received, of an engine that says nothing more."""
        return bool(await self._requests.poll(ARRIVE_MS))

    async def ping(self, timeout_s: float) -> EngineInfo | None:
        """How the engine is, or None when it does not answer in time."""
        self._control.send_multipart(encode(Ping()))
        if not await self._control.poll(int(timeout_s * 1000)):
            return None
        answer = decode(await self._control.recv_multipart())
        return answer if isinstance(answer, EngineInfo) else None

    async def close(self) -> None:
        """Closes both sockets; a cancellation on its way has half a second."""
        self._requests.close(linger=0)
        self._control.close(linger=500)
        await asyncio.to_thread(self._context.term)
