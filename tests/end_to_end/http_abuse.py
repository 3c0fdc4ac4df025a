"""Requests that are none: broken bodies, fields of other types and sizes, connections cut off, and bytes that are not
HTTP at all.
"""

import json
import random
import socket
from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

PATHS = ("/v1/images/generations", "/v1/requests", "/v1/videos")
WRONG = (None, True, -1, 0, 10**30, 1e308, "", "x" * 50_000, "\0", "\ud800", [], [[]], {}, {"a": 1}, "1e9", "NaN")
FIELDS = ("prompt", "n", "size", "model", "response_format", "quality", "stream", "seconds", "triptych")
SETTINGS = ("steps", "seed", "guidance", "negative_prompt", "timeout_s", "frames", "scheduler")
SIZES = ("0x0", "64", "x", "-64x64", "64x64x64", "999999x999999", "8x999992", "6 4x64", "63x64")
SECONDS = 10.0
Make: TypeAlias = Callable[[random.Random], bytes]


def abuse(port: int, number: int, seed: int) -> Counter[int]:
    """Sends as many; how often each status was answered. What was cut off has no answer."""
    dice, told = random.Random(seed), Counter[int]()
    for _ in range(number):
        status = send(port, dice.choice((fields, bytes_of_none, form, torn, lengths, noise))(dice), dice)
        if status is not None:
            told[status] += 1
    return told


def send(port: int, data: bytes, dice: random.Random) -> int | None:
    """One connection; the status of its answer, if there is one. Some go away at once."""
    with socket.create_connection(("127.0.0.1", port), SECONDS) as connection:
        try:
            connection.sendall(data)
            if dice.random() < 0.1:
                return None
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(64)
        except (ConnectionError, OSError):  # it was refused while it was being sent
            return None
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else None


def request(dice: random.Random, body: bytes, kind: str = "application/json", length: int | None = None) -> bytes:
    """An HTTP request."""
    length = len(body) if length is None else length
    head = f"POST {dice.choice(PATHS)} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\ncontent-length: {length}"
    return f"{head}\r\nconnection: close\r\n\r\n".encode() + body


def fields(dice: random.Random) -> bytes:
    """JSON with one wrong field."""
    asked: dict[str, object] = {"prompt": "x", "triptych": {"steps": 1}}
    if dice.random() < 0.5:
        asked["triptych"] = {dice.choice(SETTINGS): dice.choice(WRONG[2:5] + WRONG[7:12]), "steps": 10**9}
    elif dice.random() < 0.5:
        asked["size"] = dice.choice(SIZES)
    else:
        asked[dice.choice(FIELDS)] = dice.choice(WRONG)
        asked["triptych"] = {"steps": 0}
    return request(dice, json.dumps(asked).encode())


def bytes_of_none(dice: random.Random) -> bytes:
    """A body that is no JSON, or JSON with bytes changed."""
    body = bytearray(json.dumps({"prompt": "x", "n": 1, "triptych": {"steps": 0}}).encode())
    for _ in range(dice.randint(1, 8)):
        body[dice.randrange(len(body))] = dice.randrange(256)
    return request(dice, dice.choice((bytes(body), dice.randbytes(200), b"[" * 9_000, b'{"a":' * 3_000, b"")))


def form(dice: random.Random) -> bytes:
    """A form with its parts shuffled and cut."""
    body = bytearray(b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--b--\r\n' * dice.randint(1, 3))
    del body[dice.randrange(len(body)) : dice.randrange(len(body))]
    return request(
        dice, bytes(body) + b"--b\r\n\r\n", dice.choice(("multipart/form-data; boundary=b", "multipart/form-data"))
    )


def torn(dice: random.Random) -> bytes:
    """A good request that stops somewhere."""
    whole = request(dice, b'{"prompt": "x", "triptych": {"steps": 1}}')
    return whole[: dice.randrange(1, len(whole))]


def lengths(dice: random.Random) -> bytes:
    """A body with another length than it states, or with too many bytes."""
    return dice.choice((request(dice, b"{}", length=dice.choice((-1, 10**12))), request(dice, b"x" * 400_000)))


def noise(dice: random.Random) -> bytes:
    """No HTTP."""
    return dice.choice((dice.randbytes(300), b"GET /\xff\xfe HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0", b"A" * 70_000))
