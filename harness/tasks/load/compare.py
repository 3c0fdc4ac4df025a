"""task=load with sides: two configurations loaded in alternation by the same arrivals, on engines that stay warm.

Round k draws its arrivals by seed and k, and both sides get them: A B, B A, A B ... What differs is read from the
ratios of rounds, as for task=compare.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.progress import Progress

from harness.config.schema import RunConfig
from harness.engines.pool import MakeEngine, new_engine
from harness.engines.protocol import Engine
from harness.loggers.load import batching, outcomes
from harness.loggers.table import print_comparison
from harness.loggers.wandb import log_comparison
from harness.messages import EngineInfo
from harness.metrics.load import LoadSummary, RequestRow
from harness.metrics.paired import ratio
from harness.records.comparison import FILE, Comparison
from harness.records.record import FirstCall, RunFolder, Status
from harness.resolve.comparison import SIDES
from harness.resolve.compose import ResolvedRun, to_yaml
from harness.tasks.compare import make_comparison
from harness.tasks.lifecycle import mirror, run_guarded
from harness.tasks.load.run import Measured, build_load_record, judged, load_engine, started, summarized, write_rows
from harness.tasks.session import progress_bars


def compare_loads_in(
    composed: ResolvedRun, pair: tuple[ResolvedRun, ResolvedRun], folder: RunFolder, console: Console
) -> Status:
    """Compares in a claimed folder, whatever happens: the status, which is on disk before anything is mirrored."""
    config = composed.config

    def work() -> tuple[Comparison, list[LoadSummary]]:
        return compare_loads(composed, pair, folder, console)

    outcome = run_guarded(composed, folder, work, lambda done: judged(done[1]))
    status, done = outcome
    if done is not None:
        comparison, loads = done
        mirror(lambda: log_comparison(config.logger.wandb, comparison, folder.path))
        if config.logger.table:
            print_comparison(comparison, folder.path, console)
            for name, load in zip(SIDES, loads, strict=True):
                console.print(f"{name}: {load.throughput_per_s:.2f} answers/s{batching(load)}; {outcomes(load)}")
    return status


def compare_loads(
    composed: ResolvedRun,
    pair: tuple[ResolvedRun, ResolvedRun],
    folder: RunFolder,
    console: Console,
    make_engine: MakeEngine = new_engine,
) -> tuple[Comparison, list[LoadSummary]]:
    """Loads both sides in alternation; either's row is a run's folder of its own, `a` and `b`, in this one.

    Raises:
        EngineGone: a rank died, or was not ready in time.
        ValueError: a round in which a side answered no request well.
    """
    folder.write_config(to_yaml(composed.config))
    sides = [Side.claimed(side, make_engine) for side in pair]
    with progress_bars(console) as bars:
        try:
            for side in sides:
                side.start()
            for number in range(composed.config.task.repeats):
                for side in sides if number % 2 == 0 else sides[::-1]:
                    side.load(bars, number)
        finally:
            for side in sides:
                side.engine.stop()
    loads = [side.save() for side in sides]
    comparison = compared(composed, pair, [side.rounds for side in sides])
    folder.write_json(FILE, comparison)
    return comparison, loads


class Side:
    """One side: its engine, and what was measured of it in every round.

    Args:
        composed: its run.
        folder: the run's.
        engine: for it.
    """

    def __init__(self, composed: ResolvedRun, folder: RunFolder, engine: Engine) -> None:
        self.engine = engine
        self.rounds: list[Measured] = []
        self._composed = composed
        self._folder = folder
        self._info = EngineInfo("loading", 1, [])
        self._launch_ms = 0.0

    @classmethod
    def claimed(cls, composed: ResolvedRun, make_engine: MakeEngine) -> Side:
        """A side in its own run folder, which says what it runs."""
        folder = RunFolder.claim(composed.folder)
        folder.write_config(to_yaml(composed.config))
        return cls(composed, folder, make_engine(composed.config, folder.path))

    def start(self) -> None:
        """Starts the ranks.

        Raises:
            EngineGone: a rank died, or was not ready in time.
        """
        self._info, self._launch_ms = started(self.engine)

    def load(self, bars: Progress, number: int) -> None:
        """Loads it for one round.

        Raises:
            EngineGone: a rank died.
        """
        self.rounds.append(load_engine(self._composed.config, self.engine, bars, number))

    def save(self) -> LoadSummary:
        """Writes the record of all rounds; its load."""
        whole = together(self._composed.config, self.rounds)
        first = FirstCall(self._launch_ms, self._info.load_ms, [])
        record = build_load_record(self._composed, self._info, self.engine.environment, first, whole.summary)
        write_rows(self._folder.path, whole.rows)
        self._folder.write_record(record)
        self._folder.finish(judged([whole.summary]))
        return whole.summary


def compared(
    composed: ResolvedRun, pair: tuple[ResolvedRun, ResolvedRun], rounds: Sequence[list[Measured]]
) -> Comparison:
    """What the rounds of two sides say of one another.

    Raises:
        ValueError: too few rounds, or one in which a side answered no request well.
    """
    a, b = ([timed(each.summary) for each in side] for side in rounds)
    ratios = {name: ratio([x[name] for x in a], [x[name] for x in b]) for name in a[0]}
    return make_comparison(composed, pair, ratios)


def timed(load: LoadSummary) -> dict[str, float]:
    """The times of one round by name, ms: of an answer, which is one over the throughput, and percentiles.

    Raises:
        ValueError: no request was answered well.
    """
    if load.latency_ms is None:
        raise ValueError(f"a round in which nothing was answered well ({outcomes(load)}) does not compare")
    latency = load.latency_ms
    return {"answer": 1e3 / load.throughput_per_s, "latency_p50": latency.p50, "latency_p99": latency.p99}


def together(config: RunConfig, rounds: Sequence[Measured]) -> Measured:
    """All rounds as one load, each beginning where the one before it ended."""
    rows, at_s = [], 0.0
    for measured in rounds:
        rows += [shifted(row, at_s) for row in measured.rows]
        at_s += measured.summary.elapsed_s
    counted = [each.summary.evaluations for each in rounds]
    evaluations = sum(count or 0 for count in counted) if all(counted) else None
    strays = sum(each.summary.strays for each in rounds)
    return Measured(summarized(config, rows, strays, evaluations, len(rounds)), rows)


def shifted(row: RequestRow, by_s: float) -> RequestRow:
    """A request so many seconds later."""

    def later(at_s: float | None) -> float | None:
        return None if at_s is None else at_s + by_s

    return msgspec.structs.replace(
        row,
        due_s=row.due_s + by_s,
        sent_s=row.sent_s + by_s,
        began_s=later(row.began_s),
        ended_s=later(row.ended_s),
    )
