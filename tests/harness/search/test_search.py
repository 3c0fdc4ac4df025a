"""A search finds the trials that no other one beats, and a trial that was refused or is broken is none of them."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from harness.cli import dispatch
from harness.config.schema import Task
from harness.config.yaml import ConfigError, to_dict
from harness.engines.pool import MakeEngine
from harness.metrics.difference import Difference
from harness.metrics.fidelity import Fidelity
from harness.records.job import JobResult
from harness.records.record import RunFolder, Status, fingerprint
from harness.records.search import Measured, Search, read_search
from harness.resolve.compose import ResolvedRun
from harness.search.objectives import measure, resolve_directions
from harness.search.space import distribution
from harness.search.study import check_settings, check_task, new_study
from harness.tasks.report.rows import read_table
from tests.fixtures.records import record

pytest.importorskip("optuna", reason="pip install 'triptych[optuna]'")

SEARCH = ["-m", "hydra/sweeper=optuna_search", "hydra.sweep.dir=found", "logger=json", "task=bench"]
TWO = ["hydra.sweeper.objectives=[latency_ms,error]", "hydra.sweeper.n_trials=9"]
SPACE = ["request.steps=range(2,6)", "request.guidance=interval(1.0,5.0)"]
REFUSED, BROKEN = 5, 2  # steps


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the runs so far, in a working folder where a run takes no time.

    More steps are slower and closer to the reference. A run of 5 is refused. One of 2 would be the fastest and exact,
    but is broken.
    """
    ran: list[str] = []

    def run_one(run: ResolvedRun, engines: MakeEngine) -> JobResult:
        steps, guidance, config = run.config.request.steps, run.config.request.guidance, to_dict(run.config)
        assert steps is not None
        assert guidance is not None
        ran.append(run.folder.name)
        if steps == REFUSED:
            raise ConfigError("5 steps are refused")
        error = 0.0 if steps == BROKEN else 1 / steps + (guidance - 3) ** 2
        apart = Difference(error, error)
        row = msgspec.structs.replace(record(latency_ms=10.0 * steps + guidance), config=config)
        verdict = "broken" if steps == BROKEN else "approximate"
        fidelity = Fidelity("approximate", [], apart, apart, 0.1, 0.1, verdict, "")
        folder = RunFolder.claim(run.folder, run.retry)
        folder.write_record(msgspec.structs.replace(row, fingerprint=fingerprint(config), fidelity=fidelity))
        status = Status("failed", "broken: too far") if steps == BROKEN else Status("ok")
        folder.finish(status)
        return JobResult(run.folder, status)

    monkeypatch.setattr("harness.cli.run_one", run_one)
    monkeypatch.setattr(sys, "argv", ["triptych"])
    monkeypatch.chdir(tmp_path)
    return ran


def found() -> Search:
    search = read_search(Path("found"))
    assert search is not None
    return search


def unbeaten(search: Search) -> set[str]:
    """Return the runs that no other one beats, as the definition says."""
    values = {trial.measured.folder: trial.measured.values for trial in search.trials if trial.measured.values}
    return {
        name
        for name, own in values.items()
        if not any(all(b <= a for a, b in zip(own, other, strict=True)) and other != own for other in values.values())
    }


def test_the_front_of_time_and_error_has_no_refused_or_broken_trial(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatch([*SEARCH, *TWO, *SPACE]) == 0
    search, said = found(), capsys.readouterr()
    assert (search.objectives, search.directions) == (["latency_ms", "error"], ["minimize", "minimize"])
    assert len(search.trials) == 9
    steps = {int(trial.params["request.steps"]) for trial in search.trials}
    assert {REFUSED, BROKEN} < steps <= {*range(2, 6)}
    failed = {REFUSED: "5 steps are refused", BROKEN: "broken: too far"}
    for trial in search.trials:
        chosen, guidance = int(trial.params["request.steps"]), float(trial.params["request.guidance"])
        assert 1 <= guidance <= 5
        assert trial.measured.error == failed.get(chosen)
        assert trial.measured.values == (
            None if chosen in failed else pytest.approx([10 * chosen + guidance, 1 / chosen + (guidance - 3) ** 2])
        )
    assert {trial.measured.folder for trial in search.best} == unbeaten(search)
    assert len(search.best) > 1
    assert "best trials" in said.out
    report = {row.folder: row.front for row in read_table(Path("found")).rows}
    assert {name for name, front in report.items() if front is not None} == unbeaten(search)
    first = search.best[0].measured
    assert first.values is not None
    assert report[first.folder] == f"latency_ms {first.values[0]:.4g}, error {first.values[1]:.4g}"


@pytest.mark.slow
def test_a_search_in_the_folder_of_an_earlier_one_goes_on_with_its_runs(runs: list[str]) -> None:
    assert dispatch([*SEARCH, *TWO, "hydra.sweeper.n_trials=6", *SPACE]) == 0
    before = found()
    runs.clear()
    assert dispatch([*SEARCH, *TWO, "hydra.sweeper.n_trials=8", *SPACE]) == 0
    assert found().trials[:6] == before.trials
    refused = {trial.measured.folder for trial in before.trials if trial.params["request.steps"] == str(REFUSED)}
    assert {*runs} - refused == {trial.measured.folder for trial in found().trials[6:]}


def test_trials_with_the_same_values_share_a_run(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    search = ["hydra.sweeper.n_trials=7", "hydra.sweeper.n_jobs=3", "hydra.sweeper.sampler=random"]
    assert dispatch([*SEARCH, *search, "request.steps=choice(3,4)", "task.max_pixel_error=0.3"]) == 0
    assert len(runs) == 2
    assert "already done" not in capsys.readouterr().out
    assert len(found().trials) == 7
    assert [trial.params for trial in found().best] == [{"request.steps": "4"}]  # 3 steps have an error of 1/3
    too_far = {trial.measured.error for trial in found().trials if trial.params == {"request.steps": "3"}}
    assert too_far == {"its pixels are further from the reference than task.max_pixel_error=0.3"}


@pytest.mark.slow
def test_a_search_without_any_value_has_no_best_trial(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch([*SEARCH, "hydra.sweeper.n_trials=2", f"request.steps={REFUSED},{BROKEN}"]) == 1
    assert found().front == []
    assert "there is no best trial: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["request.steps=4"], "a search needs a key with several values"),
        (["hydra.sweeper.objectives=[error]", "task.fidelity=false", *SPACE], "only with task.fidelity; set it"),
        (["hydra.sweeper.n_trials=0", *SPACE], "hydra.sweeper.n_trials=0; give a whole number"),
        (["+hydra.sweeper.trials=3", *SPACE], "hydra.sweeper: "),
    ],
)
def test_bad_input_is_one_line_before_any_run(
    arguments: list[str], reason: str, runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatch([*SEARCH, *arguments]) == 2
    said = capsys.readouterr()
    assert reason in said.err
    assert said.err.count("\n") == 1
    assert runs == []
    assert [*Path().iterdir()] == []


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (lambda: resolve_directions(["latency"], None), "has 'latency'; there are latency_ms, "),
        (lambda: resolve_directions([], None), "names one objective or several"),
        (lambda: resolve_directions(["error", "error"], None), "each once"),
        (lambda: resolve_directions("error", None), r"give a list, such as hydra.sweeper.objectives=\[error\]"),
        (lambda: check_settings("steps"), "hydra.sweeper.params=steps; give KEY: VALUES"),
        (lambda: resolve_directions(["metrics.mine"], None), "add hydra.sweeper.directions"),
        (lambda: resolve_directions(["latency_ms"], ["up"]), "one of minimize and maximize for each"),
        (lambda: resolve_directions(["latency_ms"], ["minimize"] * 2), "one of minimize and maximize for each"),
        (lambda: check_task(configuration(Task.plan), ["latency_ms"]), "task=plan measures no objective"),
        (lambda: check_task(configuration(Task.bench), ["error"]), "only with task.fidelity"),
        (lambda: check_settings({}, n_jobs="many"), "hydra.sweeper.n_jobs=many; give a whole number"),
        (lambda: new_study(["minimize"], "tpe", -1), "hydra.sweeper.seed=-1; give a whole number"),
        (lambda: new_study(["minimize"], "best", 0), "there are tpe, nsga2, random"),
        (lambda: parsed("range(5,5)"), r"key=range\(5,5\): no values to search"),
        (lambda: parsed("interval(4.0,2.0)"), r"key=interval\(4.0,2.0\): no values to search"),
        (lambda: parsed("tag(log,interval(0.0,2.0))"), "no values to search"),
    ],
)
def test_a_wrong_setting_is_named(check: Callable[[], object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check()


def configuration(task: Task) -> DictConfig:
    return OmegaConf.create({"task": {"name": task, "fidelity": False}})


def test_a_metric_of_a_plug_in_has_the_direction_that_is_given(tmp_path: Path) -> None:
    assert resolve_directions(["latency_ms", "metrics.mine"], ["minimize", "maximize"]) == ["minimize", "maximize"]
    folder = RunFolder.claim(tmp_path)
    made = msgspec.structs.replace(record(), config={"task": {"max_pixel_error": None}}, metrics={"mine": 0.25})
    folder.write_record(made)
    job = JobResult(tmp_path, Status("ok"))
    assert measure(job, ["latency_ms", "metrics.mine"]).values == [10.0, 0.25]
    assert measure(job, ["energy_j"]) == Measured(tmp_path.name, None, "its record has no finite energy_j")
    assert measure(replace(job, status=Status("oom", "no memory")), ["latency_ms"]).error == "no memory"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("4,8", "CategoricalDistribution(choices=('4', '8'))"),
        ("choice(a,'b c')", r"CategoricalDistribution(choices=('a', 'b\\ c'))"),  # as Hydra escapes it
        ("range(4,11,3)", "IntDistribution(high=10, log=False, low=4, step=3)"),
        ("range(10,4,-2)", "IntDistribution(high=10, log=False, low=6, step=2)"),
        ("range(0.0,1.0,0.25)", "FloatDistribution(high=0.75, log=False, low=0.0, step=0.25)"),
        ("interval(0.5,5)", "FloatDistribution(high=5.0, log=False, low=0.5, step=None)"),
        ("tag(log,interval(0.1,10.0))", "FloatDistribution(high=10.0, log=True, low=0.1, step=None)"),
        ("int(interval(1.0,5.0))", "IntDistribution(high=5, log=False, low=1, step=1)"),
    ],
)
def test_values_of_hydra_are_distributions_of_optuna(values: str, expected: str) -> None:
    assert str(parsed(values)) == expected


def parsed(values: str) -> object:
    return distribution(OverridesParser.create().parse_override(f"key={values}"))
