"""Which engines stay warm between jobs, and when they end."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.config.schema import DType, LaunchMode, RunConfig, Task
from harness.engines.pool import EnginePool
from harness.engines.protocol import Answer, Engine, OnProgress, RequestFailed
from harness.messages import EngineInfo, Failure, GenerationRequest, GenerationResult
from harness.resolve.compose import compose_run
from harness.resolve.request import to_message

LOADED_MS = 7.0
COMPOSED = compose_run([]).config


class Toy:
    """Records the calls that it gets."""

    def __init__(self, said: list[str], name: str) -> None:
        self.environment: dict[str, str] = {}
        self.reused: str | None = None
        self.said, self.name = said, name

    def start(self, on_wait: Callable[[EngineInfo | None], None]) -> EngineInfo:
        self.said.append(f"start {self.name}")
        return EngineInfo("ready", 1, [], load_ms=LOADED_MS)

    def generate(self, request: GenerationRequest, on_progress: OnProgress) -> Answer:
        if request.seed:
            raise RequestFailed(Failure("", "rejected" if request.seed == 1 else "oom", "no"))
        return GenerationResult(request.request_id, [], [], 1.0), []

    def stop(self) -> None:
        self.said.append(f"stop {self.name}")


class Jobs:
    """Runs jobs on a pool of toy engines."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.pool = EnginePool(self.make)

    def make(self, config: RunConfig, folder: Path) -> Engine:
        return Toy(self.said, folder.name)

    def run(self, name: str, **changes: object) -> tuple[str | None, float]:
        """Return where a job's ranks came from and what loading cost; `launch__reuse=2` changes launch.reuse."""
        config = copy.deepcopy(COMPOSED)
        for key, value in changes.items():
            part, _, leaf = key.partition("__")
            setattr(getattr(config, part), leaf, value)
        engine = self.pool.engine(config, Path(name))
        info = engine.start(lambda info: None)
        try:
            engine.generate(to_message(config.request), lambda progress: None)
        finally:
            engine.stop()
        return engine.reused, info.load_ms


def test_jobs_of_one_engine_share_its_ranks_and_say_so() -> None:
    jobs = Jobs()
    with jobs.pool:
        assert jobs.run("a", request__steps=2) == (None, LOADED_MS)
        assert jobs.run("b", request__steps=3, request__prompts=["rocket"]) == ("a", 0.0)
        assert jobs.said == ["start a"]
    assert jobs.said == ["start a", "stop a"]
    assert (jobs.pool.starts, jobs.pool.reuses) == (1, 1)
    assert jobs.pool.saved_ms > 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scheduler__family", "ddpm"),
        ("attention__backend", "math"),
        ("parallel__dp", 2),
        ("model__dtype", DType.bfloat16),
        ("launch__threads_per_rank", 1),
        ("task__name", Task.bench),
        ("task__fidelity", True),
    ],
)
def test_another_engine_gets_fresh_ranks(key: str, value: object) -> None:
    jobs = Jobs()
    with jobs.pool:
        jobs.run("a")
        assert jobs.run("b", **{key: value}) == (None, LOADED_MS)
    assert jobs.said == ["start a", "stop a", "start b", "stop b"]


def test_as_many_stay_warm_as_the_configuration_says() -> None:
    jobs = Jobs()
    with jobs.pool:
        for name in "abc":
            jobs.run(name, launch__reuse=2, attention__backend="math" if name == "b" else "sdpa")
        assert jobs.said == ["start a", "start b"]
        jobs.run("d", launch__reuse=2, attention__backend="flash")
        assert jobs.said[2:] == ["stop b", "start d"]  # a was used after b
    jobs = Jobs()
    for name in "ab":
        jobs.run(name, launch__reuse=0)
    assert jobs.said == ["start a", "stop a", "start b", "stop b"]


def test_in_one_process_an_engine_is_alone() -> None:
    jobs = Jobs()
    with jobs.pool:
        jobs.run("a", launch__mode=LaunchMode.inprocess, launch__reuse=3)
        jobs.run("b", launch__mode=LaunchMode.inprocess, launch__reuse=3, attention__backend="math")
        assert jobs.said == ["start a", "stop a", "start b"]


@pytest.mark.parametrize(("seed", "ends"), [(1, False), (2, True)])
def test_ranks_are_used_again_only_where_a_failure_left_them_as_they_were(seed: int, ends: bool) -> None:
    jobs = Jobs()
    with jobs.pool:
        with pytest.raises(RequestFailed):
            jobs.run("a", request__seed=seed)
        assert ("stop a" in jobs.said) == ends
        assert jobs.run("b") == ((None, LOADED_MS) if ends else ("a", 0.0))
