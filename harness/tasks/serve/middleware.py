"""Middleware for every HTTP request: whose it is, where it comes from, and limits on its head and its body."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from harness.config.serve import ServeConfig
from harness.tasks.serve.access import AccessKeys, host_name, is_allowed_host, is_loopback
from harness.tasks.serve.multipart import form_to_json, multipart_boundary
from harness.tasks.serve.problem import HTTP_ID, Problem

JSON_HEADER = (b"content-type", b"application/json")
OPEN_PATHS = (
    "/",
    "/docs",
    "/page.css",
    "/docs.css",
    "/page.js",
    "/health",
    "/ready",
)  # the pages have no data; the first asks for the key
READING = ("GET", "HEAD", "OPTIONS")
FORM_TYPES = ("", "application/x-www-form-urlencoded", "multipart/form-data", "text/plain")  # of a page's plain form
RANGE = re.compile(r"bytes=(?:[0-9]{1,15}-[0-9]{0,15}|-[0-9]{1,15})")
HTTP_ID_FORM = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
SAFE_HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "x-content-type-options": "nosniff",
        "cross-origin-resource-policy": "same-origin",
        "content-security-policy": "default-src 'none'; img-src 'self'; media-src 'self'; sandbox",
    }
)


class RequestGuard:
    """ASGI middleware that reads the body first, refuses bad requests, and converts forms to JSON.

    It refuses heads and bodies that are too large or too slow, requests without the server's key, and requests that
    a page of another site makes a browser send. Such a request shows in its Origin, Sec-Fetch-Site or Referer header,
    or in a Host header that does not name this server (DNS rebinding). The client of an accepted request is in
    `request.state.client`.

    Args:
        app: The application behind this middleware.
        serve: The server's configuration.
        keys: The server's keys; None if everybody on loopback may use it.
    """

    def __init__(self, app: ASGIApp, serve: ServeConfig, keys: AccessKeys | None) -> None:
        self.app = app
        self._serve = serve
        self._keys = keys
        self._max_bytes = 1024 * serve.max_body_kib

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request and pass it to the application, or answer it with an error."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        http_id = choose_http_id(headers)
        send = with_own_headers(send, http_id)
        scope.setdefault("state", {})["http_id"] = http_id
        unread = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        try:
            self._check_head(scope)
            self._check_host(scope, headers)
            check_origin(scope["method"], headers)
            scope["state"]["client"] = self._client(scope, headers)
            self._check_length(headers)
            body = await self._read_body(receive)
            if body is None:
                return None
            unread = False
            scope["headers"] = [item for item in scope["headers"] if is_useful(item)]
            boundary = multipart_boundary(headers.get("content-type", ""))
            if boundary is not None:
                body = await asyncio.to_thread(form_to_json, body, boundary)
                scope["headers"] = [*((k, v) for k, v in scope["headers"] if k != b"content-type"), JSON_HEADER]
        except Problem as problem:
            return await problem.response(http_id, close=unread)(scope, receive, send)
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return await self.app(scope, replay, send)

    def _check_head(self, scope: Scope) -> None:
        size = len(scope["method"]) + len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
        size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > 1024 * self._serve.max_head_kib:
            raise too_large_head(self._serve)

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        host, own = headers.get("host", ""), (scope.get("server") or ("",))[0]
        name = host_name(host)
        if name is None or not is_allowed_host(name, self._serve, own):
            instead = "127.0.0.1 or localhost" if is_loopback(self._serve.host) else "the server's address"
            raise Problem(
                "forbidden", f"Host {host or '(none)'} is not this server; use {instead}, or set serve.allowed_hosts"
            )

    def _client(self, scope: Scope, headers: Headers) -> str:
        """Return whose request it is: `key:NAME`, or `addr:ADDRESS` on a server without keys."""
        if self._keys is None:
            return f"addr:{(scope.get('client') or ('',))[0]}"
        given = headers.getlist("authorization")
        client = self._keys.client(given[0]) if len(given) == 1 else None
        if client is not None:
            return client
        if scope["path"] in OPEN_PATHS and scope["method"] in READING:
            return ""
        raise Problem("unauthorized", "this server needs an API key; send Authorization: Bearer KEY")

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers and "content-length" in headers:  # a proxy may see another end of the body
            raise Problem("rejected", "Content-Length and Transfer-Encoding exclude one another; send one of them")
        if not (length.isascii() and length.isdecimal()):
            raise Problem("rejected", "Content-Length is not a number; send the length of the body in bytes")
        if len(length) > 18 or int(length) > self._max_bytes:
            raise self._too_large()
        encoding = headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise Problem("rejected", f"Content-Encoding {encoding} is not read; send the body as it is")

    async def _read_body(self, receive: Receive) -> bytes | None:
        """Return the whole body, or None if the client disconnected before its end."""
        body, limit_s = bytearray(), self._serve.body_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._max_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Problem("expired", f"the body did not arrive within {limit_s:g} s; send it again") from None

    def _too_large(self) -> Problem:
        return Problem("too_large", f"the body has more than {self._max_bytes} bytes; shorten it (serve.max_body_kib)")


def too_large_head(serve: ServeConfig) -> Problem:
    """Return the error for a request whose line and headers are too long."""
    return Problem(
        "head_too_large", f"the request's line and headers exceed {serve.max_head_kib} KiB (serve.max_head_kib)"
    )


def check_origin(method: str, headers: Headers) -> None:
    """Refuse a request that a page of another site made a browser send.

    Args:
        method: The method of the request.
        headers: The headers of the request.

    Raises:
        Problem: The request comes from another site.
    """
    host, origin, form = headers.get("host", ""), headers.get("origin"), media_type(headers) in FORM_TYPES
    if origin is None and form and method not in READING and "referer" in headers:  # older browsers send no Origin
        origin = headers["referer"]
    if origin is not None and origin_host(origin) != host:
        raise Problem("forbidden", f"a page of {origin} may not use this server; open the server's own page")
    site = headers.get("sec-fetch-site", "none")
    if method not in READING and site not in ("same-origin", "none"):
        raise Problem("forbidden", "a page of another site may not use this server; open the server's own page")


def origin_host(origin: str) -> str:
    """Return the host and port of an Origin or Referer header, empty if it has none."""
    with suppress(ValueError):
        return urlsplit(origin).netloc
    return ""


def media_type(headers: Headers) -> str:
    """Return the media type of a body, without its parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def is_useful(header: tuple[bytes, bytes]) -> bool:
    """Return whether the application reads a header: a Range that is not one plain range is ignored."""
    name, value = header
    return name != b"range" or RANGE.fullmatch(value.decode("latin-1")) is not None


def choose_http_id(headers: Headers) -> str:
    """Return the x-request-id of a client, if it is legal, or a new one."""
    given = headers.get(HTTP_ID, "")
    return given if HTTP_ID_FORM.fullmatch(given) else uuid.uuid4().hex


def with_own_headers(send: Send, http_id: str) -> Send:
    """Return a `send` that adds the request's id, and what keeps other sites from reading or framing an answer.

    Args:
        send: The server's own.
        http_id: The id of the HTTP request.
    """

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in {**SAFE_HEADERS, HTTP_ID: http_id}.items():
                headers.setdefault(name, value)
        await send(message)

    return send_with_headers
