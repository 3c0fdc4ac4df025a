"""task=load in a claimed folder: an engine or a server, clients that load it, their rows and the record."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
from rich.console import Console
from rich.progress import Progress

from harness.config.schema import RunConfig
from harness.config.serve import Transport
from harness.engines.environment import threads_per_rank
from harness.engines.pool import MakeEngine, new_engine
from harness.engines.protocol import Engine
from harness.loggers.load import print_load
from harness.loggers.wandb import log_load
from harness.messages import EngineInfo
from harness.metrics.load import LOST, LoadSummary, RequestRow, summarize_load
from harness.parallel.mesh import degrees, world_size
from harness.records.provenance import provenance
from harness.records.record import (
    SCHEMA,
    Attention,
    FirstCall,
    Record,
    RunFolder,
    Status,
    fingerprint,
    write_atomically,
)
from harness.records.record import Engine as EngineName
from harness.resolve.compose import ResolvedRun, to_dict, to_yaml
from harness.resolve.engines_table import engine_version
from harness.serving.transport import Connection
from harness.tasks.lifecycle import mirror, run_guarded
from harness.tasks.load import http
from harness.tasks.load.account import Account
from harness.tasks.load.arrivals import requests, schedule
from harness.tasks.load.server import Server
from harness.tasks.load.zeromq import drive
from harness.tasks.session import progress_bars

FILE = "requests.jsonl"
GRACE_S = 30.0  # beyond a request's own deadline; what has no answer then is lost


@dataclass(frozen=True)
class Measured:
    """One load: its row, and every request of it."""

    summary: LoadSummary
    rows: list[RequestRow]


def load_in(composed: ResolvedRun, folder: RunFolder, console: Console, make_engine: MakeEngine = new_engine) -> Status:
    """Loads an engine in a claimed folder, whatever happens: the status, which is on disk before it is mirrored."""
    config = composed.config

    def work() -> Record:
        return run_load(composed, folder, console, make_engine)

    outcome = run_guarded(composed, folder, work, lambda record: judged([record.load] if record.load else []))
    status, record = outcome
    if record is not None and record.load is not None:
        load = record.load
        mirror(lambda: log_load(config.logger.wandb, record, load, folder.path))
        if config.logger.table:
            print_load(record, load, folder.path, console)
    return status


def judged(loads: Sequence[LoadSummary]) -> Status:
    """Loads in which a request was answered never, or twice, or of whose server a process lives on, have failed, with
    their records on disk.
    """
    if leaked := sum(load.chaos.leaked for load in loads if load.chaos is not None):
        return Status("failed", f"{leaked} processes of the server outlived it")
    lost, strays = sum(load.outcomes.get(LOST, 0) for load in loads), sum(load.strays for load in loads)
    if not lost and not strays:
        return Status("ok")
    sent = sum(load.sent for load in loads)
    return Status(
        "failed",
        f"of {sent} requests {lost} were never answered, and {strays} answers came that nobody waited for",
    )


def run_load(composed: ResolvedRun, folder: RunFolder, console: Console, make_engine: MakeEngine) -> Record:
    """One load: the record, after it is on disk; the ranks have ended, or are their pool's.

    Raises:
        EngineGone: a rank died, or was not ready in time.
    """
    folder.write_config(to_yaml(composed.config))
    if composed.config.load.transport is Transport.http:
        record, measured = run_over_http(composed, folder, console)
    else:
        record, measured = run_over_zmq(composed, folder, console, make_engine)
    write_rows(folder.path, measured.rows)
    folder.write_record(record)
    return record


def run_over_zmq(
    composed: ResolvedRun, folder: RunFolder, console: Console, make_engine: MakeEngine
) -> tuple[Record, Measured]:
    """Loads ranks of this run's own, or of its pool.

    Raises:
        EngineGone: a rank died, or was not ready in time.
    """
    engine = make_engine(composed.config, folder.path)
    with progress_bars(console) as bars:
        try:
            info, launch_ms = started(engine)
            measured = load_engine(composed.config, engine, bars)
        finally:
            engine.stop()
    first = FirstCall(launch_ms, info.load_ms, [], engine.reused)
    return build_load_record(composed, info, engine.environment, first, measured.summary), measured


def run_over_http(composed: ResolvedRun, folder: RunFolder, console: Console) -> tuple[Record, Measured]:
    """Loads a server: the one at load.url, or one that is started for it, whose ranks may be killed meanwhile.

    Raises:
        EngineGone: the server that was started was not ready in time.
    """
    config, environment = composed.config, dict(os.environ)
    with progress_bars(console) as bars:
        if config.load.url is not None:
            measured = asyncio.run(load_server(config, config.load.url, bars))
            note = f"the server at {config.load.url} has a configuration of its own; load.* and request.* are ours"
            info, first = EngineInfo("ready", 0, []), FirstCall(0.0, 0.0, [])
            said = ResolvedRun(config, composed.overrides, composed.folder, [*composed.notes, note])
            return build_load_record(said, info, environment, first, measured.summary), measured
        with Server(served(composed.overrides), folder.path / "server", config.launch.start_timeout_s) as server:
            measured, launch_ms = asyncio.run(load_own_server(config, server, bars))
    summary = msgspec.structs.replace(measured.summary, memory=server.memory, chaos=server.chaos)
    ranks = world_size(degrees(config.parallel))
    info = EngineInfo("ready", ranks, [], threads=threads_per_rank(config.launch, ranks))
    record = build_load_record(composed, info, environment, FirstCall(launch_ms, 0.0, []), summary)
    return record, measured


def served(overrides: Sequence[str]) -> list[str]:
    """The overrides of a load's run that its server has too."""
    ours = ("task", "load", "logger", "hydra", "a", "b")
    return [each for each in overrides if each.partition("=")[0].lstrip("+").partition(".")[0] not in ours]


async def load_own_server(config: RunConfig, server: Server, bars: Progress) -> tuple[Measured, float]:
    """Loads a server that was started for it: what was measured, and how long it took to be ready, ms.

    Raises:
        EngineGone: it was not ready in time.
    """
    began = time.perf_counter()
    url = await server.ready()
    launch_ms = (time.perf_counter() - began) * 1e3
    watchers = [asyncio.create_task(server.watch_memory())]
    load = config.load
    if load.kill_every_s is not None:
        sending_s = load.warmup_s + load.duration_s
        watchers.append(asyncio.create_task(server.kill_ranks(url, load.kill_every_s, sending_s, load.seed)))
    try:
        return await load_server(config, url, bars), launch_ms
    finally:
        for watcher in watchers:
            watcher.cancel()


async def load_server(config: RunConfig, url: str, bars: Progress) -> Measured:
    """Loads a server over HTTP, in the phases of `load_engine`."""
    load = config.load
    patience = httpx.Timeout(config.serve.timeout_s + GRACE_S)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=patience, limits=limits) as client:
        if load.warmup_s:
            with counted(bars, "warming up") as tell:
                await http.drive(client, schedule(load, load.warmup_s, 0), requests(config, 0), tell)
        before = await http.evaluations(client)
        with counted(bars, "loading") as tell:
            account = await http.drive(client, schedule(load, load.duration_s, 1), requests(config, 1), tell)
        after = await http.evaluations(client)
    # ranks that were started again count from 0
    grown = None if before is None or after is None or load.kill_every_s is not None else after - before
    return Measured(summarized(config, account.rows, account.strays, grown or None), account.rows)


def started(engine: Engine) -> tuple[EngineInfo, float]:
    """Starts ranks: what they say, and how long it took, ms.

    Raises:
        EngineGone: a rank died, or was not ready in time.
    """
    began = time.perf_counter()
    info = engine.start(lambda info: None)
    return info, (time.perf_counter() - began) * 1e3


def load_engine(config: RunConfig, engine: Engine, bars: Progress, number: int = 0) -> Measured:
    """Loads ranks over ZeroMQ: warm-up, whose requests are all answered before counting begins, then the load.

    Args:
        config: of the load.
        engine: which has been started.
        bars: where the progress goes.
        number: of the load among those of one seed; each has arrivals of its own.

    Raises:
        EngineGone: a rank died.
    """
    load = config.load

    def clients(connection: Connection) -> Measured:
        def phase(length_s: float, place: int, label: str) -> Account:
            with counted(bars, label) as tell:
                patience_s = config.serve.timeout_s + GRACE_S
                return drive(connection, schedule(load, length_s, place), requests(config, place), patience_s, tell)

        if load.warmup_s:
            phase(load.warmup_s, 2 * number, "warming up")
        before = connection.ping()
        account = phase(load.duration_s, 2 * number + 1, "loading")
        evaluations = forwards(before, connection.ping())
        return Measured(summarized(config, account.rows, account.strays, evaluations), account.rows)

    return engine.attend(clients)


@contextmanager
def counted(bars: Progress, label: str) -> Iterator[Callable[[Account], None]]:
    """A bar of what is sent and answered, while it lasts; yields what moves it."""
    task = bars.add_task(label, total=None)

    def tell(account: Account) -> None:
        sent, waiting = len(account.rows), len(account.outstanding)
        bars.update(task, completed=sent - waiting, total=sent)

    yield tell
    bars.remove_task(task)


def forwards(before: EngineInfo | None, after: EngineInfo | None) -> int | None:
    """The denoiser's forwards between two pings; None where the engine does not tell."""
    counted = None if before is None or after is None else after.evaluations - before.evaluations
    return counted or None


def summarized(
    config: RunConfig, rows: Sequence[RequestRow], strays: int, evaluations: int | None, rounds: int = 1
) -> LoadSummary:
    """The row of one load, or of several rounds of it that follow one another."""
    load = config.load
    return summarize_load(
        rows,
        load.transport.name,
        load.rate,
        load.clients,
        load.duration_s * rounds,
        load.slo_ms,
        strays,
        evaluations,
    )


def build_load_record(
    composed: ResolvedRun, info: EngineInfo, environment: dict[str, str], first: FirstCall, load: LoadSummary
) -> Record:
    """The record of one load."""
    config, declared = composed.config, to_dict(composed.config)
    return Record(
        schema=SCHEMA,
        fingerprint=fingerprint(declared),
        overrides=composed.overrides,
        config=declared,
        provenance=provenance(info, environment),
        attention=Attention(config.attention.backend, info.attention),
        first_call=first,
        repeats=[],
        summary=None,
        samples=[],
        notes=composed.notes,
        loaded=info.loaded,
        engine=EngineName(config.engine.name, engine_version(config.engine.name)),
        load=load,
    )


def write_rows(folder: Path, rows: Sequence[RequestRow]) -> None:
    """Writes `requests.jsonl`, a line a request in the order of sending."""
    write_atomically(folder / FILE, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
