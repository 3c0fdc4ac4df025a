"""What every HTTP request passes first: its size, its pace, and who sends it."""

from __future__ import annotations

import asyncio
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from harness.tasks.serve.multipart import form_to_json, multipart_boundary
from harness.tasks.serve.problem import Problem

JSON = (b"content-type", b"application/json")
BODY_S = 30.0  # a body that takes longer is a client that went, or one that only holds the connection


class Guard:
    """Reads a request's body before anything else sees it, refuses what is too large, too slow or foreign, and makes a
    form the JSON that it stands for.

    A page of another site can make a browser send requests here; it is known by its Origin, and on loopback by a Host
    that is no name of this machine (DNS rebinding).

    Args:
        app: that the request goes to.
        max_bytes: of a body, with or without a stated length.
        loopback: whether the server listens on loopback only.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, loopback: bool) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            headers = Headers(scope=scope)
            self._check_origin(headers)
            self._check_length(headers)
            body = await self._body(receive)
            if body is None:
                return None
            boundary = multipart_boundary(headers.get("content-type", ""))
            if boundary is not None:
                body = form_to_json(body, boundary)
                scope["headers"] = [*((k, v) for k, v in scope["headers"] if k != b"content-type"), JSON]
        except Problem as problem:
            return await problem.response()(scope, receive, send)
        read: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return read.pop() if read else await receive()

        return await self.app(scope, replay, send)

    def _check_origin(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.loopback and not is_local(host):
            raise Problem(
                "forbidden", f"Host {host} is not this machine; use 127.0.0.1 or localhost, or set serve.host"
            )
        if origin is not None and origin.partition("://")[2] != host:
            raise Problem("forbidden", f"a page of {origin} may not use this server; open the server's own page")

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            raise Problem("rejected", "Content-Length is no number")
        if int(length) > self.max_bytes:
            raise self._too_large()

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; None where the client went before its end."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self.max_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Problem("expired", f"the body did not come within {BODY_S:g} s; send it again") from None

    def _too_large(self) -> Problem:
        return Problem("too_large", f"the body has more than {self.max_bytes} bytes; shorten it (serve.max_body_kib)")


def is_local(host: str) -> bool:
    """Whether a Host header (or `serve.host`) names this machine's loopback."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
