"""task=load as a comparison: two configurations under the same arrivals, in alternation, on engines that stay warm.

The arrivals of round k are sampled by the seed and k, and both runs get them: A B, B A, A B ... As for task=compare,
the difference is estimated from the ratios of rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.progress import Progress

from harness.client.build_record import base_record
from harness.engines.pool import MakeEngine, new_engine
from harness.engines.protocol import Engine
from harness.loggers.load import describe_outcomes
from harness.messages import EngineInfo
from harness.metrics.load import LoadSummary
from harness.metrics.paired import ratio
from harness.records.comparison import FILE, Comparison
from harness.records.provenance import Beginning
from harness.records.record import FirstCall, RunFolder
from harness.resolve.compose import ResolvedRun, to_yaml
from harness.tasks.common.comparison import make_comparison
from harness.tasks.common.progress import progress_bars
from harness.tasks.load.measurement import LoadMeasurement, merge_rounds
from harness.tasks.load.run import load_engine, start_engine, status_from_loads, write_rows


def compare_loads(
    run: ResolvedRun,
    pair: tuple[ResolvedRun, ResolvedRun],
    folder: RunFolder,
    console: Console,
    make_engine: MakeEngine = new_engine,
) -> tuple[Comparison, list[LoadSummary]]:
    """Load both engines in alternation; each run writes a run folder of its own, `a` or `b`, inside this one.

    Args:
        run: The comparison as one run.
        pair: The two runs to compare, A and B.
        folder: The claimed folder of the comparison.
        console: The console for progress.
        make_engine: The function that makes an engine.

    Returns:
        The comparison, and the summary of each run over all rounds.

    Raises:
        EngineGone: A rank died, or was not ready in time.
        ValueError: In one round, no request to one of the engines succeeded.
    """
    folder.write_config(to_yaml(run.config))
    compared = [ComparedRun.create(each, make_engine) for each in pair]
    with progress_bars(console, run.config.logger.progress) as bars:
        try:
            for each in compared:
                each.start()
            for number in range(run.config.task.repeats):
                for each in compared if number % 2 == 0 else compared[::-1]:
                    each.load(bars, number)
        finally:
            for each in compared:
                each.engine.stop()
    loads = [each.save() for each in compared]
    comparison = build_load_comparison(run, pair, [each.rounds for each in compared])
    folder.write_json(FILE, comparison)
    return comparison, loads


class ComparedRun:
    """One of the two runs of a comparison: its engine and the measurements of every round.

    Args:
        run: The resolved run.
        folder: The claimed folder of this run.
        engine: The engine of this run, not started yet.
    """

    def __init__(self, run: ResolvedRun, folder: RunFolder, engine: Engine) -> None:
        self.engine = engine
        self.rounds: list[LoadMeasurement] = []
        self._beginning = Beginning.now()
        self._run = run
        self._folder = folder
        self._info = EngineInfo("loading", 1, [])
        self._launch_ms = 0.0

    @classmethod
    def create(cls, run: ResolvedRun, make_engine: MakeEngine) -> ComparedRun:
        """Claim the run's folder, write its configuration there, and make its engine.

        Args:
            run: The resolved run.
            make_engine: The function that makes an engine.

        Returns:
            The run, with an engine that is not started yet.
        """
        folder = RunFolder.claim(run.folder)
        folder.write_config(to_yaml(run.config))
        return cls(run, folder, make_engine(run.config, folder.path))

    def start(self) -> None:
        """Start the ranks.

        Raises:
            EngineGone: A rank died, or was not ready in time.
        """
        self._info, self._launch_ms = start_engine(self.engine)

    def load(self, bars: Progress, number: int) -> None:
        """Load the engine for one round.

        Args:
            bars: The progress bars.
            number: The number of the round.

        Raises:
            EngineGone: A rank died.
        """
        self.rounds.append(load_engine(self._run.config, self.engine, bars, number))

    def save(self) -> LoadSummary:
        """Write the record of all rounds and return their summary."""
        whole = merge_rounds(self._run.config, self.rounds)
        first = FirstCall(self._launch_ms, self._info.load_ms, [])
        record = base_record(self._run, self._info, self.engine.environment, first, self._beginning)
        write_rows(self._folder.path, whole.rows)
        self._folder.write_record(msgspec.structs.replace(record, load=whole.summary))
        self._folder.finish(status_from_loads([whole.summary]))
        return whole.summary


def build_load_comparison(
    run: ResolvedRun, pair: tuple[ResolvedRun, ResolvedRun], rounds: Sequence[list[LoadMeasurement]]
) -> Comparison:
    """Build the comparison of two runs from their rounds.

    Args:
        run: The comparison as one run.
        pair: The two runs, A and B.
        rounds: The measurements of A's rounds and of B's rounds.

    Returns:
        The comparison, with the ratios of A's times over B's.

    Raises:
        ValueError: There are too few rounds, or no request of a round succeeded.
    """
    a, b = ([round_times(each.summary) for each in measurements] for measurements in rounds)
    ratios = {name: ratio([x[name] for x in a], [x[name] for x in b]) for name in a[0]}
    return make_comparison(run, pair, ratios)


def round_times(load: LoadSummary) -> dict[str, float]:
    """Collect the times of one round that are compared.

    Args:
        load: The summary of the round.

    Returns:
        Times by name, ms: `answer` is one over the throughput; the others are percentiles of the latency.

    Raises:
        ValueError: No request succeeded.
    """
    if load.latency_ms is None:
        raise ValueError(
            f"a round in which no request succeeded ({describe_outcomes(load)}) cannot be compared; lower the load"
        )
    latency = load.latency_ms
    return {"answer": 1e3 / load.throughput_per_s, "latency_p50": latency.p50, "latency_p99": latency.p99}
