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
    """`serve`: the server of task=serve, and how an engine that serves takes requests."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0 = any that is free; the address is printed
    policy: Policy = Policy.fifo
    max_batch: int = 8  # pictures whose network evaluations share forwards; 1 = one request after another
    max_queue: int = 64  # requests that wait; one more is told to come again (429)
    timeout_s: float = 600.0  # of a request, from its arrival, where it does not ask for less
    max_pictures: int = 8  # of one request
    max_steps: int = 250  # of one request
    max_body_kib: int = 256  # of an HTTP request
    keep: int = 256  # answered jobs whose pictures can still be fetched
    restarts: int = 5  # of ranks that died, within restart_window_s; then the server says that it is not ready, and why
    restart_window_s: float = 600.0


class Transport(Enum):
    """How the clients of task=load reach the engine."""

    zmq = "zmq"
    http = "http"


@dataclass
class LoadConfig:
    """`load`: the clients of task=load."""

    transport: Transport = Transport.zmq
    url: str | None = None  # a server that runs already, of load.transport=http; null = one is started
    rate: float | None = None  # requests a second, Poisson arrivals; null = `clients` in a closed loop
    clients: int = 4  # of the closed loop: each sends when its last answer has come
    duration_s: float = 30.0  # of sending; what was sent is waited for
    warmup_s: float = 2.0  # of sending before that, not counted
    slo_ms: float | None = None  # an answer within it is good; goodput counts those
    steps: list[int] = field(default_factory=list)  # drawn from for each request; empty = request.steps
    sizes: list[int] = field(default_factory=list)  # pixels a side, drawn from; empty = request.height and width
    seed: int = 0  # of arrivals and draws
    kill_every_s: float | None = None  # a rank that is ready is killed as often, of a server that task=load has started


LEAST = {
    "port": 0,
    "max_batch": 1,
    "max_queue": 1,
    "max_pictures": 1,
    "max_steps": 1,
    "max_body_kib": 1,
    "keep": 1,
    "restarts": 0,
    "timeout_s": 0.001,
    "restart_window_s": 1.0,
}


def check_serve(serve: ServeConfig, batches: bool) -> None:
    """Refuses settings that cannot serve.

    Args:
        serve: the settings.
        batches: whether this engine can share forwards between requests.

    Raises:
        ValueError: the key, its value and what to give instead.
    """
    for name, least in LEAST.items():
        if not getattr(serve, name) >= least:
            raise ValueError(f"serve.{name}={getattr(serve, name)}; give at least {least}")
    if serve.port > 65_535:
        raise ValueError(f"serve.port={serve.port}; give 0 to 65535")
    if serve.max_batch > 1 and not batches:
        raise ValueError(
            f"serve.max_batch={serve.max_batch}, but engines other than native, model.offload=true and "
            "approximate layouts draw one request after another; set serve.max_batch=1"
        )


def check_load(load: LoadConfig) -> None:
    """Refuses clients that cannot be made.

    Raises:
        ValueError: the key, its value and what to give instead.
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
