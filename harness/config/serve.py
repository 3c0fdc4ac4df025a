"""Group `serve`: the server, and how its engine takes requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

from harness.config.bounds import MAX_CONNECTIONS, MAX_IMAGES, MAX_STEPS, MAX_WAIT_S
from schedulers.options import option
from schedulers.registry import Common, Names, Registry, Target

POLICIES: Registry[Target] = Registry("request policy", "serve.policy")
"""Request policies by name: RequestPolicy (harness.serving.policy)."""


def register_request_policy(name: str, key: Target, **common: Unpack[Common]) -> None:
    """Register a request policy, for serve.policy.

    Args:
        name: The policy's name.
        key: RequestPolicy (harness.serving.policy): the function that gives a waiting request its sort key.
        **common: Options of its own, its layouts, and whether requests may share its forwards.
    """
    POLICIES.register(name, key, **common)


register_request_policy("fifo", "harness.serving.policy:first_come")
register_request_policy("shortest", "harness.serving.policy:shortest_first")
register_request_policy("deadline", "harness.serving.policy:nearest_deadline")


@dataclass
class ServeConfig:
    """`serve`: the server of task=serve, and how a serving engine takes requests."""

    host: str = option("127.0.0.1", "Address that the server listens on.")
    port: int = option(
        8000, "Port that the server listens on; 0 = any free port. The address is printed.", low=0, high=65_535
    )
    policy: str = option(
        "fifo",
        "Which waiting request of a client is next: the first, the one with the least work, or the nearest deadline; "
        "clients take turns by work.",
        words=Names(POLICIES),
    )
    max_batch: int = option(
        8,
        "Images of the default size whose network evaluations share a forward; 1 = one request after another.",
        low=1,
        high=MAX_IMAGES,
    )
    max_evaluation_s: float = option(
        0.5,
        "Longest evaluation of one image, by the speed of late, for which all others wait; a larger image is refused. "
        "Images of up to 16 times the work of the default request are always taken.",
        unit="s",
        above=0,
        high=MAX_WAIT_S,
        infinite=True,
    )
    max_queue: int = option(
        64, "Requests that may wait; one more is answered with 429 and may try again.", low=1, high=1_000_000
    )
    timeout_s: float = option(
        600.0,
        "Longest time from a request's arrival to its answer; a request may ask for less.",
        unit="s",
        low=0.001,
        high=MAX_WAIT_S,
        infinite=True,
    )
    max_images: int = option(8, "Images per request.", low=1, high=MAX_IMAGES)
    max_steps: int = option(250, "Solver steps per request.", low=1, high=MAX_STEPS)
    max_body_kib: int = option(256, "Largest size of an HTTP request.", unit="KiB", low=1, high=1_048_576)
    max_stored_results: int = option(256, "Answered requests whose images can still be fetched.", low=1, high=1_000_000)
    exit_when_failed: bool = option(
        False, "Whether a server whose ranks die more often than `restarts` ends with status 1, for who supervises it."
    )
    hang_s: float = option(
        30.0,
        "Longest silence of ranks in a step unlike all that were seen; later steps are measured against the earlier.",
        unit="s",
        low=1,
        high=MAX_WAIT_S,
    )
    drain_s: float = option(
        30.0,
        "Time for what runs when the server is stopped; what waits is refused at once.",
        unit="s",
        low=0,
        high=MAX_WAIT_S,
    )
    keep_mib: int = option(
        1024, "Size of the images, videos and logs that are kept; the oldest go first.", unit="MiB", low=1, high=2**30
    )
    keep_hours: float = option(
        24.0, "Time for which images, videos and the logs of dead ranks are kept.", unit="h", above=0, infinite=True
    )
    restarts: int = option(
        5,
        "Restarts of dead ranks within restart_window_s. After more, the server has failed until new ranks are ready, "
        "with pauses of 1, 2, 4 ... 60 s.",
        low=0,
        high=1_000,
    )
    restart_window_s: float = option(
        600.0, "Time in which restarts are counted.", unit="s", low=1, high=MAX_WAIT_S, infinite=True
    )
    api_key_file: str | None = option(
        None,
        "File of API keys, one a line, as KEY or NAME:KEY, which others may not read. The variable TRIPTYCH_API_KEY "
        "holds one more. A host other than loopback needs a key.",
    )
    allowed_hosts: list[str] = option(
        [], "Names by which clients reach the server, besides its own address: others in the Host header are refused."
    )
    max_connections: int = option(
        1_000, "Open connections; fewer if the limit of open files is too low for them.", low=1, high=MAX_CONNECTIONS
    )
    max_connections_per_address: int = option(
        100, "Open connections of one address (of one /64 in IPv6); loopback is exempt.", low=1, high=MAX_CONNECTIONS
    )
    max_head_kib: int = option(
        16, "Largest size of a request's line and headers together.", unit="KiB", low=1, high=256
    )
    head_timeout_s: float = option(
        10.0, "Longest time for a request's line and headers.", unit="s", low=0.1, high=MAX_WAIT_S
    )
    body_timeout_s: float = option(30.0, "Longest time for a request's body.", unit="s", low=0.1, high=MAX_WAIT_S)
    reader_timeout_s: float = option(
        20.0, "Longest time in which a client reads nothing of its answer.", unit="s", low=0.1, high=MAX_WAIT_S
    )
    max_unsent_mib: int = option(
        64, "Bytes of answers that wait for slow readers, over all connections.", unit="MiB", low=1, high=65_536
    )
