"""task=load in a claimed folder: an engine or a server, the clients that load it, their rows and the record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress

from harness.client.build_record import base_record
from harness.config.load import Transport
from harness.config.schema import RunConfig
from harness.engines.pool import MakeEngine
from harness.engines.protocol import Engine
from harness.loggers.wandb import mode_notes
from harness.messages import EngineInfo
from harness.metrics.load import INVALID, LOST, LoadSummary, RequestRow
from harness.records.provenance import Beginning
from harness.records.record import FirstCall, Record, RunFolder, Status, write_atomically
from harness.resolve.compose import ResolvedRun, to_yaml
from harness.serving.transport import Connection
from harness.tasks.common.progress import progress_bars
from harness.tasks.load import background
from harness.tasks.load.arrivals import arrival_schedule, generate_requests, warmup_load
from harness.tasks.load.measurement import LoadMeasurement, merge_rounds, summarize
from harness.tasks.load.neighbours import beside, busy_processes, neighbour_rounds
from harness.tasks.load.over_http import run_external, run_over_http
from harness.tasks.load.phases import GRACE_S, RanksWatch, phase_bar, with_rate
from harness.tasks.load.tracker import RequestTracker
from harness.tasks.load.zeromq import drive

REQUESTS_FILE = "requests.jsonl"


def status_from_loads(loads: Sequence[LoadSummary]) -> Status:
    """Decide whether loads succeeded.

    A load fails if a request was never answered, answered twice or answered with other images than requested, or if a
    process of its server outlived the server.
    Its record is on disk all the same.

    Args:
        loads: The summaries of one or more loads.

    Returns:
        The status of the run.
    """
    if leaked := sum(load.chaos.leaked for load in loads if load.chaos is not None):
        return Status("failed", f"{leaked} processes of the server outlived it")
    lost, strays = sum(load.outcomes.get(LOST, 0) for load in loads), sum(load.strays for load in loads)
    sent = sum(load.sent for load in loads)
    if invalid := sum(load.outcomes.get(INVALID, 0) for load in loads):
        first = next(load.invalid for load in loads if load.invalid)
        return Status("failed", f"of {sent} answers {invalid} were not the images requested: {first}")
    if not lost and not strays:
        return Status("ok")
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
    if run.config.load.url is not None:
        record, measurement = run_external(run, console)
    elif run.config.load.transport is Transport.http:
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
            warming = replace(config, load=warmup_load(load))
            loaded = with_rate(config, run_phase(warming, load.warmup_s, 2 * number, "warming up"))
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


def evaluations_between(before: EngineInfo | None, after: EngineInfo | None) -> int | None:
    """Return the number of the denoiser's forwards between two pings, or None if the engine does not report it."""
    difference = None if before is None or after is None else after.evaluations - before.evaluations
    return difference or None


def write_rows(folder: Path, rows: Sequence[RequestRow]) -> None:
    """Write `requests.jsonl`, one line per request in the order of sending."""
    write_atomically(folder / REQUESTS_FILE, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
