"""task=load in a claimed folder: an engine or a server, the clients that load it, their rows and the record."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import msgspec
from rich.console import Console
from rich.progress import Progress

from harness.client.build_record import base_record, waiting_notes
from harness.config.schema import RunConfig
from harness.config.serve import Transport
from harness.device.usage import ProcessUsage, waited_share
from harness.engines.environment import loopback_environment, rank_environment, threads_per_rank
from harness.engines.pool import MakeEngine
from harness.engines.protocol import Engine
from harness.loggers.wandb import mode_notes
from harness.messages import EngineInfo
from harness.metrics.load import LOST, OK, LoadSummary, RequestRow
from harness.records.provenance import Beginning
from harness.records.record import (
    FirstCall,
    Record,
    RunFolder,
    Status,
    write_atomically,
)
from harness.resolve.compose import ResolvedRun, to_yaml
from harness.serving.transport import Connection
from harness.tasks.common.progress import progress_bars
from harness.tasks.load import background, http
from harness.tasks.load.arrivals import arrival_schedule, generate_requests
from harness.tasks.load.connections import ConnectionStack
from harness.tasks.load.measurement import LoadMeasurement, merge_rounds, summarize
from harness.tasks.load.neighbours import beside, busy_processes, neighbour_rounds
from harness.tasks.load.server import ServerProcess
from harness.tasks.load.tracker import RequestTracker
from harness.tasks.load.zeromq import drive

REQUESTS_FILE = "requests.jsonl"
GRACE_S = 30.0  # the time beyond a request's own deadline after which a request without an answer is lost


def status_from_loads(loads: Sequence[LoadSummary]) -> Status:
    """Decide whether loads succeeded.

    A load fails if a request was never answered or answered twice, or if a process of its server outlived the server.
    Its record is on disk all the same.

    Args:
        loads: The summaries of one or more loads.

    Returns:
        The status of the run.
    """
    if leaked := sum(load.chaos.leaked for load in loads if load.chaos is not None):
        return Status("failed", f"{leaked} processes of the server outlived it")
    lost, strays = sum(load.outcomes.get(LOST, 0) for load in loads), sum(load.strays for load in loads)
    if not lost and not strays:
        return Status("ok")
    sent = sum(load.sent for load in loads)
    return Status("failed", f"of {sent} requests {lost} were never answered, and {strays} unexpected answers arrived")


def run_load(run: ResolvedRun, folder: RunFolder, console: Console, make_engine: MakeEngine) -> Record:
    """Run one load; on return the ranks have ended, or belong to their pool.

    Args:
        run: The run.
        folder: The claimed run folder.
        console: The console for progress.
        make_engine: The function that makes an engine.

    Returns:
        The record, which is on disk.

    Raises:
        EngineGone: A rank died, or was not ready in time.
    """
    folder.write_config(to_yaml(run.config))
    run = replace(run, notes=[*run.notes, *mode_notes(run.config.logger.wandb.mode)])
    if run.config.load.transport is Transport.http:
        record, measurement = run_over_http(run, folder, console)
    else:
        record, measurement = run_over_zmq(run, folder, console, make_engine)
    write_rows(folder.path, measurement.rows)
    folder.write_record(record)
    return record


def run_over_zmq(
    run: ResolvedRun, folder: RunFolder, console: Console, make_engine: MakeEngine
) -> tuple[Record, LoadMeasurement]:
    """Load ranks of this run's own, or of its pool.

    Args:
        run: The run.
        folder: The claimed run folder.
        console: The console for progress.
        make_engine: The function that makes an engine.

    Returns:
        The record and the measurement.

    Raises:
        EngineGone: A rank died, or was not ready in time.
    """
    beginning, engine = Beginning.now(), make_engine(run.config, folder.path)
    with progress_bars(console, run.config.logger.progress) as bars:
        try:
            info, launch_ms = start_engine(engine)
            watch = RanksWatch(info.pids)
            measurement = load_engine(run.config, engine, bars)
            notes = watch.notes()
        finally:
            engine.stop()
    first = FirstCall(launch_ms, info.load_ms, [], engine.reused)
    record = base_record(replace(run, notes=[*run.notes, *notes]), info, engine.environment, first, beginning)
    return msgspec.structs.replace(record, load=measurement.summary), measurement


def run_over_http(run: ResolvedRun, folder: RunFolder, console: Console) -> tuple[Record, LoadMeasurement]:
    """Load a server: the one at load.url, or one that is started for this run and whose ranks may be killed.

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
        if config.load.url is not None:
            measurement = asyncio.run(load_server(config, config.load.url, bars))
            note = (
                f"the server at {config.load.url} has its own configuration; of this run's, only load.* and request.* "
                "apply"
            )
            info, first = EngineInfo("ready", 0, []), FirstCall(0.0, 0.0, [])
            noted = replace(run, notes=[*run.notes, note])
            record = base_record(noted, info, environment, first, beginning)
            return msgspec.structs.replace(record, load=measurement.summary), measurement
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


def server_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a load's run that also apply to its server."""
    load_only = ("task", "load", "logger", "hydra", "compare", "dataset")
    keys = [each.partition("=")[0].lstrip("+") for each in overrides]
    return [
        each
        for each, key in zip(overrides, keys, strict=True)
        if key.partition(".")[0] not in load_only and key != "request.prompts_file"
    ]


class RanksWatch:
    """The use of processors by ranks during a load.

    Args:
        pids: Ids of their processes.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._before = {pid: used for pid in pids if (used := ProcessUsage.of(pid)) is not None}

    def notes(self) -> list[str]:
        """Return a note that says so if they had to wait for processors; none if one of them has ended."""
        after = {pid: ProcessUsage.of(pid) for pid in self._before}
        used = [later.since(self._before[pid]) for pid, later in after.items() if later is not None]
        return (
            waiting_notes(waited_share([(part.cpu_s, part.waited_s) for part in used])) if all(after.values()) else []
        )


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
        return await load_server(config, url, bars), launch_ms, watch.notes()
    finally:
        for watcher in watchers:
            watcher.cancel()


async def load_server(config: RunConfig, url: str, bars: Progress) -> LoadMeasurement:
    """Load a server over HTTP, in the phases of `load_engine`.

    Args:
        config: The resolved configuration of the load.
        url: The URL of the server.
        bars: The progress bars.

    Returns:
        The measurement; the number of evaluations is unknown if ranks were killed.
    """
    load = config.load
    patience = httpx.Timeout(config.serve.timeout_s + GRACE_S)
    connections, key = ConnectionStack(), http.key_header()
    async with httpx.AsyncClient(base_url=url, timeout=patience, transport=connections, headers=key) as client:
        if load.warmup_s:
            with phase_bar(bars, "warming up") as update:
                schedule = arrival_schedule(load, load.warmup_s, 0)
                warm = await http.drive(client, schedule, generate_requests(config, 0), update)
            config = with_rate(config, warm)
            load = config.load
        rounds = []
        for phase, count in enumerate(neighbour_rounds(config), start=1):
            with busy_processes(count), phase_bar(bars, "loading") as update:
                before = await http.read_evaluations(client)
                schedule = arrival_schedule(load, load.duration_s, phase)
                tracker = await http.drive(client, schedule, generate_requests(config, phase), update)
                after = await http.read_evaluations(client)
            # restarted ranks count from 0
            counts = None if before is None or after is None or load.kill_every_s is not None else after - before
            measured = LoadMeasurement(summarize(config, tracker.rows, tracker.strays, counts or None), tracker.rows)
            rounds.append(beside(measured, count))
    return merge_rounds(config, rounds)


def start_engine(engine: Engine) -> tuple[EngineInfo, float]:
    """Start the ranks of an engine.

    Args:
        engine: The engine.

    Returns:
        The state of the ranks, and the time that the start took, ms.

    Raises:
        EngineGone: A rank died, or was not ready in time.
    """
    began = time.perf_counter()
    info = engine.start(lambda info: None)
    return info, (time.perf_counter() - began) * 1e3


def load_engine(config: RunConfig, engine: Engine, bars: Progress, number: int = 0) -> LoadMeasurement:
    """Load ranks over ZeroMQ: first a warm-up, whose requests are all answered before counting begins, then the load.

    Args:
        config: The resolved configuration of the load.
        engine: The started engine.
        bars: The progress bars.
        number: The number of the load among those with the same seed; each has its own arrivals.

    Returns:
        The measurement of the load without the warm-up.

    Raises:
        EngineGone: A rank died.
    """
    load = config.load

    def clients(connection: Connection) -> LoadMeasurement:
        def run_phase(config: RunConfig, length_s: float, phase: int, label: str) -> RequestTracker:
            with phase_bar(bars, label) as update:
                patience_s = config.serve.timeout_s + GRACE_S
                schedule = arrival_schedule(config.load, length_s, phase)
                return drive(connection, schedule, generate_requests(config, phase), patience_s, update)

        loaded = config
        if load.warmup_s:
            loaded = with_rate(config, run_phase(config, load.warmup_s, 2 * number, "warming up"))
        rounds = []
        for phase, count in enumerate(neighbour_rounds(loaded)):
            with busy_processes(count):
                before = connection.ping()
                tracker = run_phase(loaded, load.duration_s, 2 * (number + phase) + 1, "loading")
                evaluations = evaluations_between(before, connection.ping())
            measured = LoadMeasurement(summarize(loaded, tracker.rows, tracker.strays, evaluations), tracker.rows)
            rounds.append(beside(measured, count))
        return merge_rounds(loaded, rounds)

    with background.background_client(config, engine):
        measurement = engine.with_connection(clients)
    if not load.background:
        return measurement
    # the forwards are those of both clients
    own = msgspec.structs.replace(measurement.summary, evaluations=None, images_per_evaluation=None)
    return replace(measurement, summary=own)


def with_rate(config: RunConfig, warm: RequestTracker) -> RunConfig:
    """Return the configuration with the rate that load.rate_share means; the same one without that key.

    Args:
        config: The resolved configuration of the load.
        warm: The requests of the warm-up.

    Raises:
        ValueError: No request of the warm-up succeeded.
    """
    share = config.load.rate_share
    if share is None:
        return config
    ended = [row.ended_s for row in warm.rows if row.outcome == OK and row.ended_s is not None]
    if not ended:
        raise ValueError("no request of the warm-up succeeded, so there is no rate; raise load.warmup_s")
    rate = share * len(ended) / max(*ended, config.load.warmup_s)
    return replace(config, load=replace(config.load, rate=rate))


@contextmanager
def phase_bar(bars: Progress, label: str) -> Iterator[Callable[[RequestTracker], None]]:
    """Show a progress bar of sent and answered requests inside a `with` block.

    Args:
        bars: The progress bars.
        label: The text beside the bar.

    Yields:
        A function that updates the bar from a tracker.
    """
    task = bars.add_task(label, total=None)

    def update(tracker: RequestTracker) -> None:
        sent, waiting = len(tracker.rows), len(tracker.outstanding)
        bars.update(task, completed=sent - waiting, total=sent)

    yield update
    bars.remove_task(task)


def evaluations_between(before: EngineInfo | None, after: EngineInfo | None) -> int | None:
    """Return the number of the denoiser's forwards between two pings, or None if the engine does not report it."""
    difference = None if before is None or after is None else after.evaluations - before.evaluations
    return difference or None


def write_rows(folder: Path, rows: Sequence[RequestRow]) -> None:
    """Write `requests.jsonl`, one line per request in the order of sending."""
    write_atomically(folder / REQUESTS_FILE, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
