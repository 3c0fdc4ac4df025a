"""task=serve: the life of the server, from its socket to the end of its ranks.

The server listens before its ranks are ready, so that /ready can say what it waits for. On SIGTERM or Ctrl-C it first
answers all outstanding requests, and then stops.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from functools import partial

from rich.console import Console
from rich.markup import escape

from harness.config.schema import RunConfig
from harness.config.serve import ServeConfig
from harness.engines.environment import OWNER
from harness.engines.fork_server import ForkServer
from harness.engines.processes import WATCH_S, is_alive
from harness.engines.rank import LOG_FORMAT
from harness.engines.torchrun import TorchrunEngine
from harness.records.record import RunFolder, Status
from harness.resolve.compose import ConfigError, ResolvedRun, to_yaml
from harness.serving.transport import EngineGone
from harness.tasks.serve.access import AccessKeys
from harness.tasks.serve.app import make_app
from harness.tasks.serve.connections import BoundedServer, raise_descriptor_limit
from harness.tasks.serve.log_limit import limit_logs
from harness.tasks.serve.supervisor import MakeSupervisedEngine, Supervisor

LOG = "server.log"
BACKLOG = 512


def listen(serve: ServeConfig) -> socket.socket:
    """Open the server's socket, before any process is started.

    Args:
        serve: The server's configuration, with its host and port.

    Returns:
        A listening socket.

    Raises:
        ConfigError: The address is taken, or does not belong to this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(serve.host, serve.port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(
            f"serve.host={serve.host} is not an address ({error.strerror}); give an address of this machine"
        ) from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"serve.port={serve.port} on {serve.host} cannot be used ({error.strerror}); choose another, or 0 for any"
        ) from error
    return found


def serve(
    run: ResolvedRun,
    folder: RunFolder,
    listening: socket.socket,
    make_engine: MakeSupervisedEngine | None = None,
    keys: AccessKeys | None = None,
) -> Status:
    """Serve in a claimed folder until SIGTERM or Ctrl-C; every process has ended on return.

    Args:
        run: The run to serve.
        folder: The claimed run folder.
        listening: The socket of `listen`; it is closed at the end.
        make_engine: The function that starts a set of ranks; None for ranks that one fork server starts.
        keys: The server's keys, as `read_keys` returns them.

    Returns:
        The status of the run.

    Raises:
        EngineGone: The first ranks never became ready.
    """
    folder.write_config(to_yaml(run.config))
    logging.basicConfig(level=logging.INFO, filename=folder.path / "logs" / LOG, format=LOG_FORMAT)
    limit_logs()
    with listening, ForkServer() as fork_server:
        make_engine = make_engine or partial(TorchrunEngine, fork_server=fork_server)
        supervisor = Supervisor(run.config, folder.path, make_engine)
        asyncio.run(_serve(run.config, folder, listening, supervisor, keys))
    failed = supervisor.state == "failed"
    return Status("failed", supervisor.reason) if failed else Status("ok")


async def _serve(
    config: RunConfig,
    folder: RunFolder,
    listening: socket.socket,
    supervisor: Supervisor,
    keys: AccessKeys | None,
) -> None:
    app, console, stop = make_app(config, supervisor, folder.path, keys), Console(), asyncio.Event()
    server = BoundedServer(app, config.serve, raise_descriptor_limit())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    http = asyncio.create_task(server.serve([listening]))
    name, path = escape(config.model.name), escape(str(folder.path))
    console.print(f"{name} on {server_url(listening)}, in {path}", soft_wrap=True)
    ranks = asyncio.create_task(_start_ranks(supervisor, console))
    stopped = asyncio.create_task(stop.wait())
    orphaned = asyncio.create_task(_stop_when_orphaned(int(os.environ.get(OWNER, "0")), stop))
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


async def _stop_when_orphaned(owner: int, stop: asyncio.Event) -> None:
    """Stop the server when the process that started it for its own task is gone, even after SIGKILL.

    Args:
        owner: The id of that process; 0 if there is none.
        stop: The event that stops the server.
    """
    while owner and is_alive(owner):
        await asyncio.sleep(WATCH_S)
    if owner:
        stop.set()


async def _start_ranks(supervisor: Supervisor, console: Console) -> None:
    """Start the ranks and print a line when they are ready.

    Args:
        supervisor: The supervisor of the ranks.
        console: The console for the line.

    Raises:
        EngineGone: The ranks never became ready.
    """
    await supervisor.start()
    if supervisor.info is None:
        raise EngineGone("the ranks ended as soon as they were ready; see logs in the run folder")
    console.print(f"ready on {supervisor.info.world_size} ranks; Ctrl-C stops", soft_wrap=True)


def server_url(listening: socket.socket) -> str:
    """Return the URL of the server for a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
