"""An asyncio client of one engine; the counterpart for threads is harness.serving.transport.Connection."""

from __future__ import annotations

import asyncio

import zmq.asyncio

from harness.messages import Cancel, EngineInfo, GenerationRequest, Message, Ping, decode, encode
from harness.serving.transport import Addresses, dealer

DRAIN_MS = 50  # how long to wait for messages that a dead process had already sent


class EngineClient:
    """Two sockets to an engine that is already listening.

    Args:
        addresses: The addresses of the engine's sockets.
    """

    def __init__(self, addresses: Addresses) -> None:
        self._context = zmq.asyncio.Context()
        self._requests = dealer(self._context, addresses.requests)
        self._control = dealer(self._context, addresses.control)

    def send(self, request: GenerationRequest) -> None:
        """Send a request to the engine's queue."""
        self._requests.send_multipart(encode(request))

    def cancel(self, request_id: str) -> None:
        """Tell the engine to cancel a request; it answers with a Failure of kind cancelled."""
        self._control.send_multipart(encode(Cancel(request_id)))

    async def receive(self) -> tuple[Message, list[bytes]]:
        """Wait for the next message about a request.

        Returns:
            The message, and all frames that it came in.

        Raises:
            MessageError: The frames are not a message.
        """
        frames: list[bytes] = await self._requests.recv_multipart()
        return decode(frames), frames

    async def has_unread(self) -> bool:
        """Return whether a message is still unread, for an engine that sends nothing more."""
        return bool(await self._requests.poll(DRAIN_MS))

    async def ping(self, timeout_s: float) -> EngineInfo | None:
        """Ping the engine.

        Args:
            timeout_s: The time to wait for the answer, seconds.

        Returns:
            The state of the engine, or None if it does not answer in time.
        """
        self._control.send_multipart(encode(Ping()))
        if not await self._control.poll(int(timeout_s * 1000)):
            return None
        answer = decode(await self._control.recv_multipart())
        return answer if isinstance(answer, EngineInfo) else None

    async def close(self, linger_ms: int = 0) -> None:
        """Close both sockets.

        Args:
            linger_ms: The time for a cancellation that is still being sent, ms.
        """
        self._requests.close(linger=0)
        self._control.close(linger=linger_ms)
        await asyncio.to_thread(self._context.term)
