"""Bounds on connections: each condition has its end, and the oldest idle connection makes room for a new one."""

import asyncio
import json
import logging
import resource
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from harness.config.schema import LoggerConfig, LogLevel, RunConfig
from harness.config.serve import ServeConfig
from harness.resolve.compose import compose_run
from harness.tasks.serve import connections
from harness.tasks.serve.connections import (
    LINGER_BYTES,
    RESERVED_DESCRIPTORS,
    ConnectionTable,
    connection_bound,
    raise_descriptor_limit,
)
from harness.tasks.serve.log_limit import MAX_CHARS, MAX_LINES, WINDOW_S, LogLimit, limited_logs
from tests.fixtures.serving.http_server import Live, live
from tests.fixtures.serving.raw_connections import LIMIT_S, connect, wait_gone

HEAD = b"POST /v1/requests HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
GOOD = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"
SHORT = ["serve.head_timeout_s=0.5", "serve.body_timeout_s=0.5", "serve.reader_timeout_s=1", "serve.max_body_kib=32"]


def server_config(*overrides: str) -> RunConfig:
    return compose_run(["task=serve", "serve.port=0", *SHORT, *overrides]).config


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(server_config(), tmp_path_factory.mktemp("site")) as found:
        yield found


def read_all(opened: socket.socket) -> bytes:
    """Return everything until the server closes the connection."""
    found = bytearray()
    try:
        while part := opened.recv(65_536):
            found += part
    except ConnectionResetError:
        pass
    return bytes(found)


def read_answer(opened: socket.socket) -> bytes:
    """Return the head of one answer; its body is read, too."""
    head, _, body = opened.recv(65_536).partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        part = opened.recv(65_536)
        assert part
        body += part
    return head


def reason(answer: bytes) -> tuple[int, str]:
    """Return the status and the code of an error."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def exchange(site: Live, *parts: bytes) -> bytes:
    with connect(site.port) as opened:
        for part in parts:
            opened.sendall(part)
        return read_all(opened)


def is_served(site: Live) -> bool:
    return httpx.get(f"{site.url}/v1/models", timeout=LIMIT_S).status_code == 200


def test_a_connection_that_says_nothing_or_half_a_head_ends(site: Live) -> None:
    assert exchange(site) == b""
    assert reason(exchange(site, GOOD[:30])) == (408, "expired")
    assert is_served(site)


def test_a_slow_head_ends_though_its_bytes_keep_coming(site: Live) -> None:
    with connect(site.port) as opened:
        opened.settimeout(0.05)
        answer = b""
        for byte in GOOD[:-1] * 3:
            opened.sendall(bytes([byte]))
            try:
                answer = opened.recv(4_096)
                break
            except TimeoutError:
                continue
        assert b" 408 " in answer


def test_the_second_head_of_a_connection_has_its_time_too(site: Live) -> None:
    answer = exchange(site, GOOD, GOOD[:20])
    first, _, second = answer.partition(b"HTTP/1.1 408 ")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert b"expired" in second


def test_an_idle_connection_between_requests_is_not_a_slow_head(tmp_path: Path) -> None:
    """The time of the second head begins with its first byte, not with the connection or the first answer."""
    with live(server_config("serve.head_timeout_s=1.5"), tmp_path) as site, connect(site.port) as opened:
        opened.sendall(GOOD)
        assert b" 200 " in read_answer(opened)
        time.sleep(2.0)
        opened.sendall(GOOD[:20])
        time.sleep(0.8)  # longer than between two sweeps
        opened.sendall(GOOD[20:])
        assert b" 200 " in read_answer(opened)


def test_a_slow_body_ends(site: Live) -> None:
    for body in (b"content-length: 100\r\n\r\n{", b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"):
        assert reason(exchange(site, HEAD + body)) == (408, "expired")


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (HEAD + b"connection: close\r\nx: " + b"y" * 17_000 + b"\r\n\r\n", 431, "head_too_large"),
        (HEAD + b"x: " + b"y" * 100_000, 431, "head_too_large"),
        (b"GET /v1/requests?" + b"a" * 60_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 431, "head_too_large"),
        (HEAD + b"a: b\r\n" * 4_000 + b"\r\n", 431, "head_too_large"),
        (HEAD + b"transfer-encoding: gzip\r\n\r\n", 400, "rejected"),
        (HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}", 400, "rejected"),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, "rejected"),
    ],
)
def test_a_head_that_is_wrong_or_too_long_is_answered(site: Live, head: bytes, status: int, code: str) -> None:
    assert reason(exchange(site, head)) == (status, code)


def test_a_head_within_its_bound_is_read(site: Live) -> None:
    with connect(site.port) as opened:
        opened.sendall(GOOD[:-2] + b"x: " + b"y" * 15_000 + b"\r\n\r\n")
        assert b" 200 " in opened.recv(65_536)


def test_a_long_head_behind_another_request_is_refused_too(site: Live) -> None:
    answer = exchange(site, GOOD + GOOD[:-2] + b"x: " + b"y" * 20_000 + b"\r\nconnection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 ") == 1
    assert answer.count(b"HTTP/1.1 431 ") == 1


def test_a_body_in_two_framings_is_refused_and_nothing_behind_it_is_read(site: Live) -> None:
    """A proxy that believes Content-Length would take the second request for a part of the first one."""
    framings = b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    answer = exchange(site, HEAD + framings + GOOD)
    assert reason(answer) == (400, "rejected")
    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_body_of_tiny_chunks_is_read_in_small_parts_and_refused(site: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk is an event of the parser: all that came at once would hold up every other connection for seconds."""
    sizes: list[int] = []
    parse = connections.BoundedProtocol.data_received

    def record(self: connections.BoundedProtocol, data: bytes) -> None:
        sizes.append(len(data))
        parse(self, data)

    monkeypatch.setattr(connections.BoundedProtocol, "data_received", record)
    chunks = b"1\r\n \r\n" * 20_000 + b"0\r\n\r\n"
    answer = exchange(site, HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + chunks)
    assert reason(answer) == (400, "rejected")
    assert b"chunks" in answer
    assert len(sizes) > 1
    assert max(sizes) <= connections.READ_BYTES


def test_a_body_of_usual_chunks_is_read(site: Live) -> None:
    padding = b" " * 16
    chunks = b'10\r\n{"prompt": "red"}\r\n'.replace(b"10", b"11") + (b"10\r\n" + padding + b"\r\n") * 1_000
    answer = exchange(site, HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    assert b"HTTP/1.1 202 " in answer


def test_a_refused_body_is_not_read_on_and_its_answer_arrives(site: Live) -> None:
    """The client sends on: it gets the answer, and then it cannot send without end."""
    with connect(site.port) as opened:
        opened.sendall(HEAD + b"content-length: 1000000000\r\n\r\n")
        with pytest.raises(ConnectionError):
            opened.sendall(b"x" * 100 * LINGER_BYTES)
    with connect(site.port) as opened:
        opened.sendall(HEAD + b"content-length: 1000000000\r\n\r\n")
        for _ in range(3):  # what was on its way: it resets nothing
            time.sleep(0.1)
            opened.sendall(b"x" * 50_000)
        assert reason(read_all(opened)) == (413, "too_large")


def test_a_client_that_stays_after_a_refusal_is_closed(site: Live) -> None:
    for sent in (b"\0\r\n\r\n", HEAD + b"content-length: 1000000000\r\n\r\n"):
        with connect(site.port) as opened:
            opened.sendall(sent)
            wait_gone(opened)


def test_no_body_is_wanted_before_its_length_is_known_to_fit(site: Live) -> None:
    expect = b"expect: 100-continue\r\ncontent-length: "
    assert reason(exchange(site, HEAD + expect + b"1000000000\r\n\r\n")) == (413, "too_large")
    with connect(site.port) as opened:
        opened.sendall(HEAD + expect + b"2\r\n\r\n")
        assert opened.recv(4_096).startswith(b"HTTP/1.1 100 ")


def test_a_client_that_does_not_read_is_closed(site: Live) -> None:
    body = {"prompt": "x" * 8_000, "triptych": {"steps": 1}}
    for _ in range(40):
        httpx.post(f"{site.url}/v1/images/generations", json=body, timeout=LIMIT_S)
    with connect(site.port, 4_096) as opened:
        opened.sendall(b"GET /v1/requests?limit=1000 HTTP/1.1\r\nhost: localhost\r\n\r\n" * 10)
        wait_gone(opened)
    assert is_served(site)


def test_an_event_stream_that_nobody_reads_ends_before_its_request(tmp_path: Path) -> None:
    config = server_config("serve.max_steps=10000", "serve.max_body_kib=64")
    with live(config, tmp_path, step_s=0.002) as site:
        body = {"prompt": "\u00e9" * 8_000, "triptych": {"steps": 10_000}}
        made = httpx.post(f"{site.url}/v1/requests", json=body, timeout=LIMIT_S).json()
        with connect(site.port, 4_096) as opened:
            opened.sendall(f"GET /v1/requests/{made['id']}/events HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            wait_gone(opened)
        found = httpx.get(f"{site.url}/v1/requests/{made['id']}", timeout=LIMIT_S).json()
        assert found["status"] == "running"
        httpx.delete(f"{site.url}/v1/requests/{made['id']}", timeout=LIMIT_S)


def test_idle_connections_make_room_for_new_ones(tmp_path: Path) -> None:
    config = server_config("serve.max_connections=8", "serve.head_timeout_s=60")
    with live(config, tmp_path, step_s=0.05) as site:
        busy = connect(site.port)
        body = json.dumps({"prompt": "x", "triptych": {"steps": 60}}).encode()
        head = HEAD.replace(b"/v1/requests", b"/v1/images/generations")
        busy.sendall(head + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        idle = [connect(site.port) for _ in range(40)]
        assert is_served(site)
        assert read_all(idle[0]) == b""
        idle[-1].sendall(GOOD)
        assert b" 200 " in idle[-1].recv(65_536)
        assert b" 200 " in busy.recv(65_536)  # it is the oldest, but it had a request in flight
        for opened in (busy, *idle):
            opened.close()


def test_half_a_body_or_an_event_stream_makes_room_and_a_client_that_waits_does_not(tmp_path: Path) -> None:
    config = server_config("serve.max_connections=8", "serve.body_timeout_s=60", "serve.max_queue=100")
    body = json.dumps({"prompt": "x", "triptych": {"steps": 250}}).encode()
    whole = (
        HEAD.replace(b"/v1/requests", b"/v1/images/generations")
        + f"content-length: {len(body)}\r\n\r\n".encode()
        + body
    )
    with live(config, tmp_path, step_s=0.05) as site:
        request_id = httpx.post(
            f"{site.url}/v1/requests", content=body, headers={"content-type": "application/json"}
        ).json()["id"]
        stream = f"GET /v1/requests/{request_id}/events HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
        opened: list[socket.socket] = []
        for sent in (HEAD + b"content-length: 100\r\n\r\n{", stream, whole):
            for _ in range(8):
                opened.append(connect(site.port))
                opened[-1].sendall(sent)
                if sent is stream:
                    assert b" 200 " in opened[-1].recv(65_536)
        assert all(read_all(each) == b"" for each in opened[:8])
        time.sleep(0.3)
        with connect(site.port) as refused:
            assert reason(read_all(refused)) == (429, "busy")
        opened[-1].close()
        time.sleep(0.3)
        assert is_served(site)
        for each in opened:
            each.close()


def test_the_server_ends_with_connections_in_every_condition(tmp_path: Path) -> None:
    opened: list[socket.socket] = []
    began = time.monotonic()
    with live(server_config("serve.head_timeout_s=60", "serve.body_timeout_s=60"), tmp_path) as site:
        for part in (
            b"",
            GOOD[:9],
            GOOD,
            HEAD + b"content-length: 9\r\n\r\n",
            HEAD + b"content-length: 99999999\r\n\r\n",
            b"\0\r\n\r\n",
        ):
            opened.append(connect(site.port))
            opened[-1].sendall(part)
        time.sleep(0.3)
        began = time.monotonic()
    assert time.monotonic() - began < LIMIT_S
    for each in opened:
        each.close()


class FakeConnection:
    """A connection as the table sees it."""

    def __init__(self, unsent: int = 0, unread_since: float = 0.0, answering: bool = False) -> None:
        self.unsent, self.unread_since, self.answering = unsent, unread_since, answering
        self.reasons: list[str] = []
        self.table: ConnectionTable | None = None

    def abort(self, reason: str) -> None:
        self.reasons.append(reason)
        if self.table is not None:
            self.table.remove(self)  # type: ignore[arg-type]

    def check(self, now: float) -> None:
        pass


def table_of(bound: int = 100, **limits: int) -> tuple[ConnectionTable, Callable[..., FakeConnection | None]]:
    table = ConnectionTable(ServeConfig(**limits), bound)  # type: ignore[arg-type]

    def add(address: str, **state: Any) -> FakeConnection | None:
        made = FakeConnection(**state)
        made.table = table
        return made if table.add(made, address) else None  # type: ignore[arg-type]

    return table, add


def test_an_address_has_a_bound_of_its_own_and_loopback_has_none() -> None:
    table, add = table_of(max_connections_per_address=2)
    first, second, other = add("192.0.2.1"), add("192.0.2.1"), add("192.0.2.9")
    assert first is not None
    assert second is not None
    third = add("192.0.2.1")
    assert third is not None
    assert first.reasons
    for busy in (second, third):
        table.set_idle(busy, False)  # type: ignore[arg-type]
    assert add("192.0.2.1") is None
    assert add("::ffff:192.0.2.1") is None
    assert other is not None
    assert not other.reasons
    assert all(add("127.0.0.1") for _ in range(20))
    assert len(table) == 23
    table.remove(third)  # type: ignore[arg-type]
    table.remove(third)  # type: ignore[arg-type]
    assert add("192.0.2.1") is not None


def test_the_oldest_idle_connection_is_closed_first() -> None:
    table, add = table_of(bound=3)
    first, second, third = (add(f"192.0.2.{k}") for k in range(3))
    table.set_idle(first, False)  # type: ignore[arg-type]
    table.set_idle(first, True)  # type: ignore[arg-type]
    assert add("192.0.2.7") is not None
    assert [bool(each.reasons) for each in (first, second, third) if each] == [False, True, False]


def test_answers_that_wait_for_slow_readers_are_bounded_together() -> None:
    table, add = table_of(max_unsent_mib=4)
    slow = add("192.0.2.1", unsent=3 * 2**20, unread_since=1.0)
    slower = add("192.0.2.2", unsent=2 * 2**20, unread_since=0.0)
    quick = add("192.0.2.3")
    table.sweep(2.0)
    assert [bool(each.reasons) for each in (slow, slower, quick) if each] == [False, True, False]
    table.sweep(3.0)
    assert slow is not None
    assert not slow.reasons


def test_the_bound_on_connections_leaves_open_files_for_the_rest() -> None:
    serve = ServeConfig(max_connections=1_000)
    assert connection_bound(serve, 1024) == (1024 - RESERVED_DESCRIPTORS) // 2
    assert connection_bound(serve, 1_000_000) == 1_000
    assert connection_bound(serve, 64) == 8
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        assert raise_descriptor_limit() == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_server_without_open_files_waits_and_writes_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accept, failures = asyncio.SelectorEventLoop.sock_accept, [0]

    async def without_files(loop: Any, listening: socket.socket) -> Any:
        if failures[0] < 3:
            failures[0] += 1
            raise OSError(24, "Too many open files")
        return await accept(loop, listening)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_accept", without_files)
    with caplog.at_level(logging.WARNING), live(server_config(), tmp_path) as site:
        assert is_served(site)
    assert failures[0] == 3
    lines = [record for record in caplog.records if record.name == connections.__name__]
    assert [record.getMessage() for record in lines] == ["a connection could not be accepted: Too many open files"] * 3


def record(line: int, message: str = "x %s", *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("a", logging.WARNING, "a.py", line, message, arguments, None)


def test_a_log_has_few_lines_of_one_cause() -> None:
    now = [0.0]
    limit = LogLimit(lambda: now[0])
    passed = [limit.filter(record(1, "x %s", k)) for k in range(1000)]
    assert sum(passed) == MAX_LINES
    assert limit.filter(record(2, "another"))
    now[0] = WINDOW_S
    late = record(1, "x %s", 7)
    assert limit.filter(late)
    assert late.getMessage() == f"x 7 ({1000 - MAX_LINES} more in the last minute)"
    long = record(3, "%s", "y" * 10**6)
    assert limit.filter(long)
    assert len(long.getMessage()) < MAX_CHARS + 10


def test_the_logs_of_a_server_are_limited_while_it_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every handler has the same lines, a second server in this process its own file, and nothing is left behind."""
    log = logging.getLogger("test")
    state = logging.getLogger().level, list(logging.getLogger().handlers)
    for name in ("first", "second"):
        caplog.clear()
        with limited_logs(logging.FileHandler(tmp_path / name), LoggerConfig(level=LogLevel.warning)):
            for k in range(100):
                log.warning("line %d", k)
            log.info("not shown")
        assert len(caplog.records) == len((tmp_path / name).read_text().splitlines()) == MAX_LINES
    assert (logging.getLogger().level, logging.getLogger().handlers) == state
    caplog.clear()
    for k in range(100):
        log.warning("line %d", k)
    assert len(caplog.records) == 100


def test_a_wrong_bound_is_refused() -> None:
    for override in ("serve.max_connections=0", "serve.head_timeout_s=0", "serve.max_head_kib=1000"):
        with pytest.raises(ValueError, match=override.partition("=")[0]):
            compose_run(["task=serve", override])
    assert replace(ServeConfig(), max_connections=5).max_connections == 5
