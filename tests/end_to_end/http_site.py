"""The HTTP server over a planted supervisor on a port of this machine, in a thread of its own."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from harness.config.schema import RunConfig
from harness.tasks.serve.app import make_app
from harness.tasks.serve.serve import UvicornServer, listen, server_url
from tests.harness.planted import Planted


@dataclass
class Live:
    """Where it listens, and its engine, which belongs to the server's thread."""

    url: str
    port: int
    engine: Planted
    socket: socket.socket


@contextmanager
def live(config: RunConfig, folder: Path, step_s: float = 0.0) -> Iterator[Live]:
    """A server while it lasts."""
    engine = Planted(config, step_s)
    app = make_app(config, engine, folder)  # type: ignore[arg-type]
    server = UvicornServer(uvicorn.Config(app, lifespan="off", log_level="warning", timeout_graceful_shutdown=5))
    with listen(config.serve) as listening:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
        thread.start()
        try:
            yield Live(server_url(listening), listening.getsockname()[1], engine, listening)
        finally:
            server.should_exit = True
            thread.join(20)
