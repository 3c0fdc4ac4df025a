"""Group `load`: the clients of task=load, when they send, and what they send to another project's server."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

from harness.config.bounds import MAX_IMAGES, MAX_SIDE, MAX_STEPS, MAX_TRAINING_SEED, MAX_WAIT_S
from schedulers.options import option

MAX_REQUESTS = 1_000_000


class Transport(Enum):
    """How the clients of task=load reach the engine."""

    zmq = "zmq"
    http = "http"


class Dialect(Enum):
    """The API of a server: which fields it reads of a request, and where they stand.

    `triptych` is this project's, `openai` OpenAI's images API without fields of anybody's own, `sglang` that of
    SGLang-Diffusion, and `vllm_omni` that of vLLM-Omni.
    """

    triptych = "triptych"
    openai = "openai"
    sglang = "sglang"
    vllm_omni = "vllm_omni"


class Ramp(Enum):
    """How a rate grows from load.ramp_from to load.rate."""

    linear = "linear"
    exponential = "exponential"


class Scenario(Enum):
    """A scenario of MLPerf Inference."""

    single_stream = "single_stream"
    server = "server"
    offline = "offline"


@dataclass
class LoadConfig:
    """Group `load`: the clients of task=load.

    Its options beside `default` are the scenarios of MLPerf Inference, with their minimum durations and query counts.
    """

    scenario: Scenario | None = option(
        None, "Scenario of MLPerf whose minimums the record is held to; load=SCENARIO sets it.", words=Scenario
    )
    transport: Transport = option(Transport.zmq, "How the clients reach the engine.")
    url: str | None = option(
        None,
        "Root of a running server, such as http://127.0.0.1:8000, with load.transport=http. null = one is started.",
    )
    dialect: Dialect = option(Dialect.triptych, "API of the server at load.url: which fields it reads, and where.")
    model: str | None = option(
        None, "Model that requests to load.url name. null = the one that its /v1/models answers with."
    )
    extra_body: dict[str, Any] = option(
        {}, "Further fields of each request to load.url, such as '{true_cfg_scale: 4}', sent as they are."
    )
    rate: float | None = option(
        None, "Arrivals at random times. null = `clients` in a closed loop.", unit="requests/s", low=1e-6, high=10_000
    )
    rate_share: float | None = option(
        None,
        "Arrivals at random times, as a share of the answers per second that `clients` get in the warm-up.",
        low=0.01,
        high=10,
    )
    burstiness: float = option(
        1.0,
        "Shape of the gamma distribution of the gaps between arrivals: 1 = Poisson arrivals, less = bursts, more = "
        "even gaps.",
        low=0.001,
        high=1_000,
    )
    ramp_from: float | None = option(
        None,
        "Rate at the start, which changes to load.rate. null = load.rate from the start.",
        unit="requests/s",
        low=1e-6,
        high=10_000,
    )
    ramp_s: float | None = option(
        None, "Time of that change. null = load.duration_s.", unit="s", above=0, high=MAX_WAIT_S
    )
    ramp: Ramp = option(Ramp.linear, "How the rate changes from load.ramp_from to load.rate.")
    trace: str | None = option(
        None,
        "File of arrivals to replay, .jsonl or .csv: time_s or time_ms, and optionally prompt, negative_prompt, seed, "
        "steps, height and width or size.",
    )
    trace_sha256: str | None = option(
        None, "Hash (sha256) that load.trace must have. null = any; a run's config.yaml has it."
    )
    at_once: bool = option(False, "Send all of load.requests at the start.")
    requests: int | None = option(
        None, "Number of requests to send, however long it takes. null = by load.duration_s.", low=1, high=MAX_REQUESTS
    )
    clients: int = option(
        4, "Clients of the closed loop; each sends its next request after its last answer.", low=1, high=10_000
    )
    duration_s: float = option(
        30.0, "Time of sending; the answers to what was sent are waited for.", unit="s", above=0, high=MAX_WAIT_S
    )
    warmup_s: float = option(
        2.0, "Time of sending before that, which is not counted.", unit="s", low=0, high=MAX_WAIT_S
    )
    min_duration_s: float = option(
        0.0,
        "Shortest time of a run that counts; the record says whether it was reached.",
        unit="s",
        low=0,
        high=MAX_WAIT_S,
    )
    min_queries: int = option(
        0,
        "Fewest answered requests of a run that counts; the record says whether they were reached.",
        low=0,
        high=MAX_REQUESTS,
    )
    slo_ms: float | None = option(
        None, "Latency objective; goodput counts the answers within it.", unit="ms", above=0, infinite=True
    )
    slo_percentile: float | None = option(
        None,
        "Percentage of the requests that must be answered within load.slo_ms; the record says whether they were.",
        unit="%",
        above=0,
        high=100,
    )
    steps: list[int] = option(
        [], "Solver steps, sampled for each request; empty = request.steps.", low=1, high=MAX_STEPS
    )
    sizes: list[int] = option(
        [],
        "Sides of an image, sampled for each request; empty = the request's size.",
        unit="pixels",
        low=1,
        high=MAX_SIDE,
    )
    seed: int = option(0, "Seed of the arrivals and of the sampled steps and sizes.", low=0, high=MAX_TRAINING_SEED)
    background: int = option(
        0,
        "Requests of a second client without an answer at any time, each as large as the engine takes; 0 = no client.",
        low=0,
        high=10_000,
    )
    kill_every_s: float | None = option(
        None,
        "Time between kills of a ready rank, in a server that task=load started. null = none is killed.",
        unit="s",
        low=0.001,
        high=MAX_WAIT_S,
    )
    neighbours: list[int] = option(
        [],
        "Busy processes beside the ranks, such as [0,1,2]: a load beside each number of them, in task.repeats rounds.",
        low=0,
        high=MAX_IMAGES,
    )


def check_load(load: LoadConfig) -> None:
    """Refuse clients that cannot be made.

    Raises:
        ValueError: A setting is wrong; the message has the key, its value and what to give instead.
    """
    check_url(load)
    check_arrivals(load)
    if load.background and load.transport is not Transport.zmq:
        raise ValueError("load.background is a second client over ZeroMQ; use load.transport=zmq")
    if load.kill_every_s is not None and load.transport is not Transport.http:
        raise ValueError("load.kill_every_s kills ranks of a server, which starts them again; add load.transport=http")
    if load.kill_every_s is not None and load.url is not None:
        raise ValueError("load.kill_every_s kills ranks of a server that it has started; drop load.url")
    if load.neighbours and load.url is not None:
        raise ValueError("load.neighbours are processes beside ranks that it has started; drop load.url")
    if load.slo_percentile is not None and load.slo_ms is None:
        raise ValueError(f"load.slo_percentile={load.slo_percentile:g} needs a latency objective; add load.slo_ms")


def check_url(load: LoadConfig) -> None:
    """Refuse an address that is not the root of a server, and what only a server at an address has.

    Raises:
        ValueError: A setting is wrong; the message has the key, its value and what to give instead.
    """
    if load.url is None:
        only = {"dialect": load.dialect is not Dialect.triptych, "model": load.model is not None}
        for key, given in (only | {"extra_body": bool(load.extra_body)}).items():
            if given:
                raise ValueError(f"load.{key} is for a server that runs already; add load.url and load.transport=http")
        return
    if load.transport is not Transport.http:
        raise ValueError("load.url names an HTTP server; add load.transport=http")
    try:
        parts = urlsplit(load.url)
        is_root = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_root = False
    if not is_root or parts.query or parts.fragment:
        raise ValueError(f"load.url={load.url}; give the root of a server, such as http://127.0.0.1:8000")
    if parts.username is not None:
        raise ValueError("load.url has a name or password; put the key into OPENAI_API_KEY or TRIPTYCH_API_KEY")
    if "/v1" in parts.path:
        root = load.url[: load.url.index("/v1", len(parts.scheme) + 3)]
        raise ValueError(f"load.url={load.url} is a route of a server; give its root, {root}")


def check_arrivals(load: LoadConfig) -> None:
    """Refuse arrivals that contradict one another.

    Raises:
        ValueError: Settings exclude each other; the message says which to drop or add.
    """
    if load.rate_share is not None and (load.rate is not None or not load.warmup_s):
        raise ValueError("load.rate_share sets the rate by the warm-up; give load.warmup_s, and no load.rate")
    rates = [name for name in ("rate", "rate_share") if getattr(load, name) is not None]
    if load.trace is not None:
        own = [*rates, *(name for name in ("at_once", "steps", "sizes") if getattr(load, name))]
        if own:
            raise ValueError(f"load.trace has arrivals of its own; drop load.{own[0]}")
    if load.at_once and rates:
        raise ValueError(f"load.at_once sends everything at the start; drop load.{rates[0]}")
    if load.at_once and load.requests is None:
        raise ValueError("load.at_once needs the number of requests; add load.requests")
    if load.burstiness != 1 and not rates:
        raise ValueError(f"load.burstiness={load.burstiness:g} shapes the arrivals of a rate; add load.rate")
    if load.ramp_from is not None and load.rate is None:
        raise ValueError("load.ramp_from is the rate at the start; add load.rate, the one at the end")
    if load.ramp_from is None and (load.ramp_s is not None or load.ramp is not Ramp.linear):
        raise ValueError("load.ramp and load.ramp_s change the rate from load.ramp_from; add that")
