"""The connections of a load generator: one for each request in flight, used again."""

import asyncio

import httpx
import pytest

from harness.tasks.load.connections import ConnectionStack

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Server:
    """A server that answers once as many requests as it was told wait, and counts its connections."""

    def __init__(self) -> None:
        self.connections = 0
        self.wanted = 1
        self._waiting: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while request := await reader.readuntil(b"\r\n\r\n"):
            if request.startswith(b"GET /broken"):
                writer.close()
                return
            self._waiting.append(writer)
            if len(self._waiting) == self.wanted:
                for each in self._waiting:
                    each.write(ANSWER)
                self._waiting.clear()


async def answers(client: httpx.AsyncClient, server: Server, count: int) -> list[str]:
    server.wanted = count
    return [response.text for response in await asyncio.gather(*(client.get("/") for _ in range(count)))]


async def connections_after(counts: list[int], break_one: bool = False) -> list[int]:
    """Return the number of connections so far after each number of requests at the same time."""
    found, state = [], Server()
    server = await asyncio.start_server(state.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", transport=ConnectionStack()) as client:
        for count in counts:
            assert await answers(client, state, count) == ["ok"] * count
            found.append(state.connections)
            if break_one:
                with pytest.raises(httpx.RemoteProtocolError):
                    await client.get("/broken")
    return found


def test_each_request_in_flight_has_a_connection_which_is_used_again() -> None:
    assert asyncio.run(connections_after([3, 1, 2, 3, 5, 4])) == [3, 3, 3, 3, 5, 5]


def test_a_broken_connection_is_not_used_again() -> None:
    assert asyncio.run(connections_after([2, 2, 2], break_one=True)) == [2, 3, 4]
