"""Middleware for every HTTP request: limits on the body's size and time, and a check of the request's origin."""

from __future__ import annotations

import asyncio
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from harness.tasks.serve.multipart import form_to_json, multipart_boundary
from harness.tasks.serve.problem import Problem

JSON_HEADER = (b"content-type", b"application/json")
BODY_TIMEOUT_S = 30.0  # a slower body comes from a client that is gone, or that only holds the connection


class RequestGuard:
    """ASGI middleware that reads the body first, refuses bad requests, and converts forms to JSON.

    It refuses bodies that are too large or too slow, and requests of other web sites. A page of another site can make
    a browser send requests here. Such a request is recognised by its Origin header. On loopback it is also
    recognised by a Host header that does not name this machine (DNS rebinding).

    Args:
        app: The application behind this middleware.
        max_bytes: The largest accepted body in bytes, with or without a Content-Length.
        loopback: Whether the server listens on loopback only.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, loopback: bool) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request and pass it to the application, or answer it with an error."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            headers = Headers(scope=scope)
            self._check_origin(headers)
            self._check_length(headers)
            body = await self._read_body(receive)
            if body is None:
                return None
            boundary = multipart_boundary(headers.get("content-type", ""))
            if boundary is not None:
                body = form_to_json(body, boundary)
                scope["headers"] = [*((k, v) for k, v in scope["headers"] if k != b"content-type"), JSON_HEADER]
        except Problem as problem:
            return await problem.response()(scope, receive, send)
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

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
            raise Problem("rejected", "Content-Length is not a number; send the length of the body in bytes")
        if int(length) > self.max_bytes:
            raise self._too_large()

    async def _read_body(self, receive: Receive) -> bytes | None:
        """Return the whole body, or None if the client disconnected before its end."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
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
            raise Problem("expired", f"the body did not arrive within {BODY_TIMEOUT_S:g} s; send it again") from None

    def _too_large(self) -> Problem:
        return Problem("too_large", f"the body has more than {self.max_bytes} bytes; shorten it (serve.max_body_kib)")


def is_local(host: str) -> bool:
    """Return whether a Host header (or `serve.host`) names this machine's loopback."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
