"""Groups `serve` and `load`: the server, how its engine takes requests, and the clients that measure it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Policy(Enum):
    """Which waiting request is next: the first that came, the one with the least work, or the nearest deadline."""

    fifo = "fifo"
    shortest = "shortest"
    deadline = "deadline"


@dataclass
class ServeConfig:
    """`serve`: the server of task=serve, and how a serving engine takes requests."""

    host: str = "127.0.0.1"  # address that the server listens on
    port: int = 8000  # port that the server listens on; 0 = any free port; the address is printed
    policy: Policy = Policy.fifo  # which waiting request is next
    max_batch: int = 8  # images whose network evaluations share forwards; 1 = one request after another
    max_queue: int = 64  # requests that may wait; one more is answered with 429 and may try again
    timeout_s: float = 600.0  # longest time from a request's arrival to its answer, s; a request may ask for less
    max_images: int = 8  # images per request
    max_steps: int = 250  # solver steps per request
    max_body_kib: int = 256  # size of an HTTP request, KiB
    max_stored_results: int = 256  # answered requests whose images can still be fetched
    restarts: int = 5  # restarts of dead ranks within restart_window_s, after which the server reports not ready
    restart_window_s: float = 600.0  # time in which restarts are counted, s


class Transport(Enum):
    """How the clients of task=load reach the engine."""

    zmq = "zmq"
    http = "http"


@dataclass
class LoadConfig:
    """`load`: the clients of task=load."""

    transport: Transport = Transport.zmq  # zmq or http
    url: str | None = None  # address of a running server, with load.transport=http; null = one is started
    rate: float | None = None  # requests per second, as Poisson arrivals; null = `clients` in a closed loop
    clients: int = 4  # clients of the closed loop; each sends its next request after its last answer
    duration_s: float = 30.0  # time of sending, s; the answers to what was sent are waited for
    warmup_s: float = 2.0  # time of sending before that, s, which is not counted
    slo_ms: float | None = None  # latency objective, ms; goodput counts the answers within it
    steps: list[int] = field(default_factory=list)  # solver steps, sampled for each request; empty = request.steps
    sizes: list[int] = field(default_factory=list)  # pixels per side, sampled for each request; empty = request's size
    seed: int = 0  # seed of the arrivals and of the sampled steps and sizes
    kill_every_s: float | None = None  # time between kills of a ready rank, s, in a server that task=load started


MINIMUM = {
    "port": 0,
    "max_batch": 1,
    "max_queue": 1,
    "max_images": 1,
    "max_steps": 1,
    "max_body_kib": 1,
    "max_stored_results": 1,
    "restarts": 0,
    "timeout_s": 0.001,
    "restart_window_s": 1.0,
}


def check_serve(serve: ServeConfig) -> None:
    """Refuse settings that cannot serve.

    Raises:
        ValueError: A setting cannot serve; the message has the key, its value and what to give instead.
    """
    for name, minimum in MINIMUM.items():
        if not getattr(serve, name) >= minimum:
            raise ValueError(f"serve.{name}={getattr(serve, name)}; give at least {minimum}")
    if serve.port > 65_535:
        raise ValueError(f"serve.port={serve.port}; give 0 to 65535")


def check_load(load: LoadConfig) -> None:
    """Refuse clients that cannot be made.

    Raises:
        ValueError: A setting is wrong; the message has the key, its value and what to give instead.
    """
    for name in ("rate", "slo_ms", "kill_every_s", "duration_s"):
        value = getattr(load, name)
        if value is not None and not value > 0:
            raise ValueError(f"load.{name}={value}; give more than 0")
    if load.clients < 1:
        raise ValueError(f"load.clients={load.clients}; give at least 1")
    if load.warmup_s < 0:
        raise ValueError(f"load.warmup_s={load.warmup_s}; give at least 0")
    if load.url is not None and load.transport is not Transport.http:
        raise ValueError("load.url names an HTTP server; add load.transport=http")
    if load.kill_every_s is not None and load.transport is not Transport.http:
        raise ValueError("load.kill_every_s kills ranks of a server, which starts them again; add load.transport=http")
    if load.kill_every_s is not None and load.url is not None:
        raise ValueError("load.kill_every_s kills ranks of a server that it has started; drop load.url")
