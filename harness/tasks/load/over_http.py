"""task=load over HTTP: a server that is started for the run, or one that runs already."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import replace

import httpx
import msgspec
from rich.console import Console
from rich.progress import Progress

from harness.client.build_record import base_record
from harness.config.load import Dialect
from harness.config.schema import RunConfig
from harness.engines.environment import loopback_environment, rank_environment, threads_per_rank
from harness.messages import EngineInfo
from harness.metrics.load import OK
from harness.records.provenance import Beginning
from harness.records.record import FirstCall, Record, RunFolder
from harness.resolve.compose import ResolvedRun
from harness.tasks.common.progress import progress_bars
from harness.tasks.load import http
from harness.tasks.load.arrivals import arrival_schedule, generate_foreign, generate_requests, warmup_load
from harness.tasks.load.connections import ConnectionStack
from harness.tasks.load.dialects import Wire
from harness.tasks.load.external import ask_server, external_record
from harness.tasks.load.measurement import LoadMeasurement, merge_rounds, summarize
from harness.tasks.load.neighbours import beside, busy_processes, neighbour_rounds
from harness.tasks.load.phases import GRACE_S, RanksWatch, phase_bar, with_rate
from harness.tasks.load.server import ServerProcess
from harness.tasks.load.tracker import RequestTracker


def run_over_http(run: ResolvedRun, folder: RunFolder, console: Console) -> tuple[Record, LoadMeasurement]:
    """Load a server that is started for this run, and whose ranks may be killed.

    Args:
        run: The run.
        folder: The claimed run folder.
        console: The console for progress.

    Returns:
        The record and the measurement.

    Raises:
        EngineGone: The server that was started was not ready in time.
    """
    config, environment, beginning = run.config, dict(os.environ), Beginning.now()
    with progress_bars(console, run.config.logger.progress) as bars:
        overrides = server_overrides(run.overrides)
        with ServerProcess(overrides, folder.path / "server", config.launch.start_timeout_s) as server:
            measurement, launch_ms, notes = asyncio.run(load_own_server(config, server, bars))
    summary = msgspec.structs.replace(measurement.summary, memory=server.memory, chaos=server.chaos)
    threads = threads_per_rank(config.launch, run.world_size)
    info = EngineInfo("ready", run.world_size, [], threads=threads)
    environment |= rank_environment(config, run.world_size) | loopback_environment()  # as the server has set them
    noted = replace(run, notes=[*run.notes, *notes])
    record = base_record(noted, info, environment, FirstCall(launch_ms, 0.0, []), beginning)
    return msgspec.structs.replace(record, load=summary), measurement


def run_external(run: ResolvedRun, console: Console) -> tuple[Record, LoadMeasurement]:
    """Load the server at load.url.

    Args:
        run: The run.
        console: The console for progress.

    Returns:
        The record and the measurement.

    Raises:
        ValueError: The server is not one that can be measured so; one line says what to change.
    """
    config, beginning = run.config, Beginning.now()

    async def clients() -> tuple[Wire, LoadMeasurement]:
        async with server_client(config, config.load.url or "") as client:
            server = await ask_server(client, config.load)
            measurement = await load_server(config, client, bars, server.wire)
        row = server.row(next(generate_foreign(config, 0)))
        return server.wire, replace(measurement, summary=msgspec.structs.replace(measurement.summary, server=row))

    with progress_bars(console, config.logger.progress) as bars:
        wire, measurement = asyncio.run(clients())
    return msgspec.structs.replace(external_record(run, wire, beginning), load=measurement.summary), measurement


def server_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a load's run that also apply to its server."""
    load_only = ("task", "load", "logger", "hydra", "compare", "dataset")
    keys = [each.partition("=")[0].lstrip("+") for each in overrides]
    return [
        each
        for each, key in zip(overrides, keys, strict=True)
        if key.partition(".")[0] not in load_only and key != "request.prompts_file"
    ]


async def load_own_server(
    config: RunConfig, server: ServerProcess, bars: Progress
) -> tuple[LoadMeasurement, float, list[str]]:
    """Load a server that was started for this run.

    Args:
        config: The resolved configuration of the load.
        server: The started server.
        bars: The progress bars.

    Returns:
        The measurement, the time until the server was ready, ms, and notes for the record.

    Raises:
        EngineGone: The server was not ready in time.
    """
    began = time.perf_counter()
    url = await server.wait_ready()
    launch_ms = (time.perf_counter() - began) * 1e3
    watchers = [asyncio.create_task(server.watch_memory())]
    load, watch = config.load, RanksWatch(list(server.ranks().values()))
    if load.kill_every_s is not None:
        sending_s = load.warmup_s + load.duration_s * len(neighbour_rounds(config))
        watchers.append(asyncio.create_task(server.kill_ranks(url, load.kill_every_s, sending_s, load.seed)))
    try:
        async with server_client(config, url) as client:
            return await load_server(config, client, bars), launch_ms, watch.notes()
    finally:
        for watcher in watchers:
            watcher.cancel()


async def load_server(
    config: RunConfig, client: httpx.AsyncClient, bars: Progress, wire: Wire = http.OWN
) -> LoadMeasurement:
    """Load a server over HTTP, in the phases of `load_engine`.

    Args:
        config: The resolved configuration of the load.
        client: The HTTP client, with the server's base URL.
        bars: The progress bars.
        wire: How requests are written.

    Returns:
        The measurement; the number of evaluations is unknown if ranks were killed, or if the server is another's.

    Raises:
        ValueError: No request of the warm-up to another's server succeeded.
    """
    load, is_foreign = config.load, config.load.url is not None
    has_metrics = wire.dialect is Dialect.triptych
    requests = generate_foreign if is_foreign else generate_requests

    async def run_phase(config: RunConfig, length_s: float, phase: int, label: str) -> RequestTracker:
        with phase_bar(bars, label) as update:
            schedule = arrival_schedule(config.load, length_s, phase)
            return await http.drive(client, schedule, requests(config, phase), update, wire)

    if load.warmup_s:
        warm = await run_phase(replace(config, load=warmup_load(load)), load.warmup_s, 0, "warming up")
        if is_foreign:
            check_warmup(warm)
        config = with_rate(config, warm)
    rounds = []
    for phase, count in enumerate(neighbour_rounds(config), start=1):
        with busy_processes(count):
            before = await http.read_evaluations(client) if has_metrics else None
            tracker = await run_phase(config, load.duration_s, phase, "loading")
            after = await http.read_evaluations(client) if has_metrics else None
        # restarted ranks count from 0
        counts = None if before is None or after is None or load.kill_every_s is not None else after - before
        measured = LoadMeasurement(summarize(config, tracker.rows, tracker.strays, counts or None), tracker.rows)
        rounds.append(beside(measured, count))
    return merge_rounds(config, rounds)


def server_client(config: RunConfig, url: str) -> httpx.AsyncClient:
    """Return an HTTP client without a bound on connections, which sends the key of the server's dialect.

    Args:
        config: The resolved configuration of the load.
        url: The URL of the server.
    """
    patience = httpx.Timeout(config.serve.timeout_s + GRACE_S)
    headers = http.key_header(config.load.dialect)
    return httpx.AsyncClient(base_url=url, timeout=patience, transport=ConnectionStack(), headers=headers)


def check_warmup(warm: RequestTracker) -> None:
    """Refuse to measure a server that answered no request of the warm-up.

    Args:
        warm: The requests of the warm-up.

    Raises:
        ValueError: None of them succeeded; the message has the first answer.
    """
    if warm.rows and not any(row.outcome == OK for row in warm.rows):
        first = warm.rows[0]
        raise ValueError(f"no request of the warm-up succeeded; the first was {first.outcome}: {first.message}")
