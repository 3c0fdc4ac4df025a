"""task=serve: the server's life, from its socket to the end of its ranks.

It listens before its ranks are ready, so that /ready can say what it waits for, and ends in order on SIGTERM or Ctrl-C:
what is outstanding is answered first.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from rich.console import Console
from rich.markup import escape

from harness.config.schema import LaunchMode, RunConfig
from harness.config.serve import ServeConfig
from harness.engines.environment import OWNER
from harness.engines.processes import is_alive
from harness.engines.rank import LOG_FORMAT, WATCH_S
from harness.engines.torchrun import TorchrunEngine
from harness.records.record import RunFolder, Status
from harness.resolve.compose import ConfigError, ResolvedRun, to_yaml
from harness.serving.transport import EngineGone
from harness.tasks.serve.app import make_app
from harness.tasks.serve.supervisor import MakeRanks, Supervisor

LOG = "server.log"
BACKLOG = 512
KEEP_ALIVE_S = 75  # longer than clients keep a connection (httpx 5 s): who closes first loses no request
CLOSE_S = 5  # for connections to end, once every request has its answer


class UvicornServer(uvicorn.Server):
    """uvicorn without its own handling of signals, which would end connections before their requests are answered."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves them as they are."""
        yield


def check(config: RunConfig) -> None:
    """Refuses what can be composed, and cannot be served.

    Raises:
        ConfigError: with what to change.
    """
    if config.launch.mode is LaunchMode.inprocess:
        raise ConfigError("task=serve watches ranks in processes of their own; drop launch.mode=inprocess")


def listen(serve: ServeConfig) -> socket.socket:
    """The socket of the server, before anything is started.

    Raises:
        ConfigError: the address is taken, or is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(serve.host, serve.port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"serve.host={serve.host} is no address ({error.strerror})") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"serve.port={serve.port} on {serve.host} cannot be had ({error.strerror}); choose another, or 0 for any"
        ) from error
    return found


def execute_serve(
    composed: ResolvedRun, folder: RunFolder, listening: socket.socket, make_engine: MakeRanks = TorchrunEngine
) -> Status:
    """Serves in a claimed folder until SIGTERM or Ctrl-C: the status, once every process has ended.

    Args:
        composed: what to serve.
        folder: the claimed folder.
        listening: of `listen`; it is closed at the end.
        make_engine: makes its ranks.

    Raises:
        EngineGone: the first ranks were never ready.
    """
    folder.write_config(to_yaml(composed.config))
    logging.basicConfig(level=logging.INFO, filename=folder.path / "logs" / LOG, format=LOG_FORMAT)
    supervisor = Supervisor(composed.config, folder.path, make_engine)
    with listening:
        asyncio.run(_serve(composed.config, folder, listening, supervisor))
    failed = supervisor.state == "failed"
    return Status("failed", supervisor.reason) if failed else Status("ok")


async def _serve(config: RunConfig, folder: RunFolder, listening: socket.socket, supervisor: Supervisor) -> None:
    app, console, stop = make_app(config, supervisor, folder.path), Console(), asyncio.Event()
    settings = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_S,
    )
    server = UvicornServer(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    http = asyncio.create_task(server.serve([listening]))
    console.print(f"{escape(config.model.name)} on {address(listening)}, in {escape(str(folder.path))}", soft_wrap=True)
    ranks = asyncio.create_task(_announce(supervisor, console))
    stopped = asyncio.create_task(stop.wait())
    orphaned = asyncio.create_task(_orphaned(int(os.environ.get(OWNER, "0")), stop))
    try:
        await asyncio.wait((http, ranks, stopped), return_when=asyncio.FIRST_COMPLETED)
        if ranks.done():
            ranks.result()
            await asyncio.wait((http, stopped), return_when=asyncio.FIRST_COMPLETED)
        console.print("stopping", soft_wrap=True)
    finally:
        await supervisor.stop()
        await asyncio.gather(ranks, return_exceptions=True)
        await app.state.service.close()
        server.should_exit = True
        await http
        stopped.cancel()
        orphaned.cancel()


async def _orphaned(owner: int, stop: asyncio.Event) -> None:
    """Stops the server when the process that started it for a task of its own is gone: also after its SIGKILL."""
    while owner and is_alive(owner):
        await asyncio.sleep(WATCH_S)
    if owner:
        stop.set()


async def _announce(supervisor: Supervisor, console: Console) -> None:
    """Starts the ranks, and says so.

    Raises:
        EngineGone: they were never ready.
    """
    await supervisor.start()
    if supervisor.info is None:
        raise EngineGone("the ranks ended as soon as they were ready")
    console.print(f"ready on {supervisor.info.world_size} ranks; Ctrl-C stops", soft_wrap=True)


def address(listening: socket.socket) -> str:
    """Where a browser finds the server."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
