"""Faults of about 1 % make a bench fail wherever they are: in the run, in run and reference, or in one repeat."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from harness.client.generator import DiffusionGenerator, Generation
from harness.config.schema import RunConfig
from harness.messages import EngineInfo
from harness.metrics.fidelity import Fidelity
from harness.records.record import read_record, read_status
from harness.resolve.compose import compose_run
from harness.tasks.common import references
from harness.tasks.common.measure import execute
from harness.tasks.common.session import MeasurementSession
from tests.fixtures.plants import PLANTS, Plant

BENCH = ["task=bench", "task.warmup=0", "launch.mode=inprocess", "launch.threads_per_rank=1", "logger=json"]
REQUEST = ["request.prompt=rocket", "request.steps=3"]
OF_THE_RUN = ("method in float32",)  # generated with the run's own code
QUICK = (("attention scale", "bfloat16"), ("guidance", "bfloat16"), ("VAE scale", "float32"))
EVERY = [(name, dtype) for name in PLANTS for dtype in ("float32", "bfloat16")]


def cases(quick: tuple[tuple[str, str], ...]) -> list[object]:
    """Return every fault in both dtypes, as slow tests but for a few."""
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in EVERY]


@pytest.fixture(scope="module")
def right_references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Right references, which faults of the run alone share."""
    return tmp_path_factory.mktemp("references")


def checked(folder: Path, right_references: Path, dtype: str, *overrides: str) -> tuple[Fidelity, str]:
    """Run a bench as the command does; return its fidelity and its state."""
    given = [f"task.references={right_references}", f"hydra.run.dir={folder}", f"model.dtype={dtype}", *overrides]
    run = compose_run([*BENCH, *REQUEST, *given])
    execute(run, Console(quiet=True))
    record = read_record(folder)
    assert record is not None
    assert record.fidelity is not None, record.notes
    return record.fidelity, read_status(folder).state


def plant_in_run(monkeypatch: pytest.MonkeyPatch, plant: Plant) -> None:
    """Make a fault act in what is generated with the run's own code only, and keep nothing of that for other tests."""
    plant.plant(monkeypatch)
    right, keep = references.ReferenceRenderer.generate, references.References.output

    def generate(
        self: references.ReferenceRenderer, config: RunConfig, role: str, requests: int = 1
    ) -> references.GeneratedOutput:
        plant.active = role in OF_THE_RUN
        try:
            return right(self, config, role, requests)
        finally:
            plant.active = True

    def output(
        self: references.References, config: RunConfig, role: str, requests: int = 1
    ) -> references.GeneratedOutput:
        return (self.generate if role in OF_THE_RUN else partial(keep, self))(config, role, requests)

    monkeypatch.setattr(references.ReferenceRenderer, "generate", generate)
    monkeypatch.setattr(references.References, "output", output)


@pytest.mark.parametrize(("name", "dtype"), cases(QUICK))
def test_a_fault_of_the_run(
    name: str, dtype: str, tmp_path: Path, right_references: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_in_run(monkeypatch, Plant(PLANTS[name]))
    fidelity, state = checked(tmp_path / "run", right_references, dtype, "task.repeats=1")
    assert (fidelity.verdict, state) == ("broken", "failed")
    assert "method" in {check.name for check in fidelity.broken}


@pytest.mark.parametrize(("name", "dtype"), cases((("swapped halves", "bfloat16"), ("sigma row", "float32"))))
def test_a_fault_of_run_and_reference(name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Plant(PLANTS[name]).plant(monkeypatch)
    fidelity, state = checked(tmp_path / "run", tmp_path / "references", dtype, "task.repeats=1")
    assert (fidelity.verdict, state) == ("broken", "failed")
    assert {check.name for check in fidelity.broken} <= {"shared arithmetic", "noise scheduler", "operators"}


@pytest.mark.parametrize(("name", "dtype"), cases((("one head", "bfloat16"),)))
@pytest.mark.parametrize("number", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_fault_of_one_repeat(
    name: str, dtype: str, number: int, tmp_path: Path, right_references: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = Plant(PLANTS[name])
    plant.active = False
    plant.plant(monkeypatch)
    right = MeasurementSession.repeat

    def repeat(self: MeasurementSession) -> None:
        plant.active = len(self.repeats) + 1 == number
        right(self)
        plant.active = False

    monkeypatch.setattr(MeasurementSession, "repeat", repeat)
    fidelity, state = checked(tmp_path / "run", right_references, dtype, "task.repeats=3")
    assert (fidelity.verdict, state) == ("broken", "failed")
    assert "repeats" in {check.name for check in fidelity.broken}


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_a_fault_of_warm_engines(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins with the second request of every engine, so that all repeats have it and no single reference."""
    plant = Plant(PLANTS["guidance"])
    plant.plant(monkeypatch)
    right, start = DiffusionGenerator.generate, DiffusionGenerator.start
    requests: dict[int, int] = {}

    def begin(self: DiffusionGenerator, *given: Any) -> EngineInfo:
        requests[id(self)] = 0
        return start(self, *given)

    def generate(self: DiffusionGenerator, *given: Any, **named: Any) -> Generation:
        requests[id(self)] += 1
        plant.active = requests[id(self)] > 1
        return right(self, *given, **named)

    monkeypatch.setattr(DiffusionGenerator, "start", begin)
    monkeypatch.setattr(DiffusionGenerator, "generate", generate)
    fidelity, state = checked(tmp_path / "run", tmp_path / "kept", dtype, "task.repeats=2", "task.warmup=1")
    assert (fidelity.verdict, state) == ("broken", "failed")
    assert "method" in {check.name for check in fidelity.broken}


def test_a_damaged_reference_is_made_again(tmp_path: Path) -> None:
    first, _ = checked(tmp_path / "first", tmp_path / "refs", "float32", "task.repeats=1", "task.fidelity_peer=false")
    assert first.generated == ["reference", "floor"]
    for file in (tmp_path / "refs").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    again, state = checked(
        tmp_path / "again", tmp_path / "refs", "float32", "task.repeats=1", "task.fidelity_peer=false"
    )
    assert (again.verdict, state, again.generated) == ("within_floor", "ok", ["reference", "floor"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_honest_run(dtype: str, tmp_path: Path, right_references: Path) -> None:
    fidelity, state = checked(tmp_path / "run", right_references, dtype, "task.repeats=2")
    assert (fidelity.verdict, state) == ("within_floor", "ok")
    names = {check.name for check in fidelity.checks}
    assert names >= {"method", "repeats", "shared arithmetic", "noise scheduler"}
    assert ("dtype" in names) == (dtype == "bfloat16")
    assert fidelity.detectable == 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(20))
def test_an_honest_run_is_never_broken(seed: int, dtype: str, tmp_path: Path, right_references: Path) -> None:
    fidelity, state = checked(tmp_path / "run", right_references, dtype, "task.repeats=3", f"request.seed={seed}")
    assert (fidelity.verdict, state) == ("within_floor", "ok")
