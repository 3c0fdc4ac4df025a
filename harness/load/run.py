"""task=load in a claimed folder: an engine or a server, clients that load it, their rows and the record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress

from harness.compose import Composed, to_dict, to_yaml
from harness.config.schema import RunConfig
from harness.engine import Engine
from harness.generate import ended, mirror
from harness.load.account import Account
from harness.load.arrivals import requests, schedule
from harness.load.zeromq import drive
from harness.loggers.load import print_load
from harness.loggers.wandb import log_load
from harness.messages import EngineInfo
from harness.metrics.load import LOST, LoadSummary, RequestRow, summarize_load
from harness.peer.table import engine_version
from harness.pool import MakeEngine, new_engine
from harness.provenance import provenance
from harness.records import (
    SCHEMA,
    Attention,
    FirstCall,
    Record,
    RunFolder,
    Status,
    fingerprint,
    write_atomically,
)
from harness.records import Engine as EngineName
from harness.series import progress_bars
from harness.serving.transport import Connection

FILE = "requests.jsonl"
GRACE_S = 30.0  # beyond a request's own deadline; what has no answer then is lost


@dataclass(frozen=True)
class Measured:
    """One load: its row, and every request of it."""

    summary: LoadSummary
    rows: list[RequestRow]


def load_in(composed: Composed, folder: RunFolder, console: Console, make_engine: MakeEngine = new_engine) -> Status:
    """Loads an engine in a claimed folder, whatever happens: the status, which is on disk before it is mirrored."""
    config = composed.config

    def work() -> Record:
        return run_load(composed, folder, console, make_engine)

    outcome = ended(composed, folder, work, lambda record: judged([record.load] if record.load else []))
    status, record = outcome
    if record is not None and record.load is not None:
        load = record.load
        mirror(lambda: log_load(config.logger.wandb, record, load, folder.path))
        if config.logger.table:
            print_load(record, load, folder.path, console)
    return status


def judged(loads: Sequence[LoadSummary]) -> Status:
    """Loads in which a request was answered never, or twice, have failed, with their records on disk."""
    lost, strays = sum(load.outcomes.get(LOST, 0) for load in loads), sum(load.strays for load in loads)
    if not lost and not strays:
        return Status("ok")
    sent = sum(load.sent for load in loads)
    return Status(
        "failed",
        f"of {sent} requests {lost} were never answered, and {strays} answers came that nobody waited for",
    )


def run_load(composed: Composed, folder: RunFolder, console: Console, make_engine: MakeEngine) -> Record:
    """One load: the record, after it is on disk; the ranks have ended, or are their pool's.

    Raises:
        EngineGone: a rank died, or was not ready in time.
    """
    folder.write_config(to_yaml(composed.config))
    engine = make_engine(composed.config, folder.path)
    with progress_bars(console) as bars:
        try:
            info, launch_ms = started(engine)
            measured = load_engine(composed.config, engine, bars)
        finally:
            engine.stop()
    first = FirstCall(launch_ms, info.load_ms, [], engine.reused)
    record = build_load_record(composed, info, engine.environment, first, measured.summary)
    write_rows(folder.path, measured.rows)
    folder.write_record(record)
    return record


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
            task = bars.add_task(label, total=None)

            def tell(account: Account) -> None:
                sent, waiting = len(account.rows), len(account.outstanding)
                bars.update(task, completed=sent - waiting, total=sent)

            patience_s = config.serve.timeout_s + GRACE_S
            account = drive(connection, schedule(load, length_s, place), requests(config, place), patience_s, tell)
            bars.remove_task(task)
            return account

        if load.warmup_s:
            phase(load.warmup_s, 2 * number, "warming up")
        before = connection.ping()
        account = phase(load.duration_s, 2 * number + 1, "loading")
        evaluations = forwards(before, connection.ping())
        return Measured(summarized(config, account.rows, account.strays, evaluations), account.rows)

    return engine.attend(clients)


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
    composed: Composed, info: EngineInfo, environment: dict[str, str], first: FirstCall, load: LoadSummary
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
