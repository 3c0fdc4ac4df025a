"""The connections of a load generator, whose cost does not grow with the requests that wait for an answer."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx

ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1)


class ConnectionStack(httpx.AsyncBaseTransport):
    """A transport with one connection for each request in flight; the one that became idle last is used first.

    The pool of httpcore, which httpx uses, looks at all of its connections for each request and for each answer. With
    the few hundred that are open after a pause of the server, that takes more time than the server does, of the same
    processors.
    """

    def __init__(self) -> None:
        self._idle: list[httpx.AsyncHTTPTransport] = []
        self._context = httpx.create_ssl_context()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request on an idle connection, or on a new one."""
        connection = self._idle.pop() if self._idle else httpx.AsyncHTTPTransport(verify=self._context, limits=ONE)
        try:
            response = await connection.handle_async_request(request)
        except BaseException:
            await connection.aclose()
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Body(response.stream, connection, self._idle)
        return response

    async def aclose(self) -> None:
        """Close the idle connections."""
        while self._idle:
            await self._idle.pop().aclose()


class _Body(httpx.AsyncByteStream):
    """The body of an answer, which gives its connection back at the end."""

    def __init__(
        self, body: httpx.AsyncByteStream, connection: httpx.AsyncHTTPTransport, idle: list[httpx.AsyncHTTPTransport]
    ) -> None:
        self._body = body
        self._connection = connection
        self._idle = idle

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._body:
            yield chunk

    async def aclose(self) -> None:
        await self._body.aclose()
        self._idle.append(self._connection)
