"""Which engines stay warm between jobs, and when they end."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.config.optimize import Optimize
from harness.config.schema import DType, LaunchMode, RunConfig, SolverConfig, Task
from harness.engines.pool import SMALL_BYTES, EnginePool
from harness.engines.protocol import Answer, OnProgress, RequestFailed
from harness.messages import EngineInfo, Failure, GenerationRequest, GenerationResult, LoadedComponent
from harness.resolve.compose import compose_run
from harness.resolve.request import to_message
from harness.serving.transport import EngineGone

LOADED_MS, CHANGED_MS = 7.0, 2.0
COMPOSED = compose_run([]).config
ROLES: dict[str, dict[str, object]] = {
    "measured": {"task__name": Task.bench},
    "reference": {"engine__optimize": Optimize.none},
    "floor": {"engine__optimize": Optimize.none, "launch__reproducible": False},
}
"""What the ranks of a bench, of its reference and of the reference's floor differ in."""


class Toy:
    """Records the calls that it gets."""

    def __init__(self, said: list[str], name: str, weight_bytes: int) -> None:
        self.environment: dict[str, str] = {}
        self.weight_bytes = weight_bytes
        self.reused: str | None = None
        self.said, self.name = said, name

    def start(self, on_wait: Callable[[EngineInfo | None], None]) -> EngineInfo:
        self.said.append(f"start {self.name}")
        weights = LoadedComponent("denoiser", "", "float32", 1, self.weight_bytes, 1.0)
        return EngineInfo("ready", 1, [], load_ms=LOADED_MS, loaded=[weights])

    def configure(self, config: RunConfig) -> EngineInfo:
        if self.said[-1] == "break":
            raise EngineGone("no such weights")
        self.said.append(f"change {self.name}")
        return EngineInfo("ready", 1, [], load_ms=CHANGED_MS)

    def generate(self, request: GenerationRequest, on_progress: OnProgress) -> Answer:
        if request.seed:
            raise RequestFailed(Failure("", "rejected" if request.seed == 1 else "oom", "no"))
        return GenerationResult(request.request_id, [], [], 1.0), []

    def stop(self) -> None:
        self.said.append(f"stop {self.name}")


class Jobs:
    """Runs jobs on a pool of toy engines."""

    def __init__(self, weight_bytes: int = 4) -> None:
        self.said: list[str] = []
        self.pool = EnginePool(self.make)
        self.weight_bytes = weight_bytes

    def make(self, config: RunConfig, folder: Path) -> Toy:
        return Toy(self.said, folder.name, self.weight_bytes)

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
        ("scheduler__solver", SolverConfig("heun")),
        ("cache__name", "teacache"),
        ("attention__backend", "math"),
        ("model__dtype", DType.bfloat16),
        ("task__fidelity", True),
    ],
)
def test_the_ranks_of_one_job_change_to_what_the_next_one_runs(key: str, value: object) -> None:
    jobs = Jobs()
    with jobs.pool:
        jobs.run("a")
        assert jobs.run("b", **{key: value}) == ("a", CHANGED_MS)
        assert jobs.run("c", **{key: value}) == ("a", 0.0)
    assert jobs.said == ["start a", "change a", "stop a"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parallel__dp", 2),
        ("launch__threads_per_rank", 1),
        ("launch__reproducible", False),
        ("engine__optimize", Optimize.none),
        ("engine__name", "cache_dit"),
        ("task__name", Task.bench),
        ("task__name", Task.load),
    ],
)
def test_what_a_process_keeps_for_its_life_needs_fresh_ranks(key: str, value: object) -> None:
    jobs = Jobs()
    with jobs.pool:
        jobs.run("a", launch__reuse=1)
        assert jobs.run("b", launch__reuse=1, **{key: value}) == (None, LOADED_MS)
    assert jobs.said == ["start a", "stop a", "start b", "stop b"]


def test_a_server_of_another_noise_scheduler_has_fresh_ranks() -> None:
    jobs = Jobs()
    with jobs.pool:
        jobs.run("a", task__name=Task.load)
        assert jobs.run("b", task__name=Task.load) == ("a", 0.0)
        assert jobs.run("c", task__name=Task.load, scheduler__family="ddpm") == (None, LOADED_MS)


def test_as_many_stay_warm_as_the_configuration_says() -> None:
    jobs = Jobs()
    with jobs.pool:
        for name in "abc":
            jobs.run(name, launch__reuse=2, attention__backend="math" if name == "b" else "sdpa")
        assert jobs.said == ["start a", "start b"]
        jobs.run("d", launch__reuse=2, attention__backend="flash")
        assert jobs.said[2:] == ["change b"]  # a was used after b
        jobs.run("e", launch__reuse=2, attention__backend="flash", parallel__dp=2)
        assert jobs.said[3:] == ["stop a", "start e"]
    jobs = Jobs()
    for name in "ab":
        jobs.run(name, launch__reuse=0)
    assert jobs.said == ["start a", "stop a", "start b", "stop b"]


@pytest.mark.parametrize(("weight_bytes", "starts"), [(4, 3), (SMALL_BYTES + 1, 6)])
def test_the_ranks_of_references_stay_beside_measured_ones_of_small_weights(weight_bytes: int, starts: int) -> None:
    jobs, solvers = Jobs(weight_bytes), (SolverConfig("euler"), SolverConfig("heun"))
    with jobs.pool:
        for number, solver in enumerate(solvers):
            for role, changes in ROLES.items():
                jobs.run(f"{role}{number}", scheduler__solver=solver, **changes)
    assert jobs.pool.starts == starts


def test_an_engine_that_a_run_has_is_not_given_to_another_one() -> None:
    jobs = Jobs()
    with jobs.pool:
        first = jobs.pool.engine(COMPOSED, Path("a"))
        first.start(lambda info: None)
        jobs.run("b", scheduler__family="ddpm")
        assert jobs.said == ["start a", "start b"]
        first.stop()
        assert jobs.run("c") == ("a", 0.0)


def test_ranks_that_do_not_take_a_configuration_are_not_used_again() -> None:
    jobs = Jobs()
    with jobs.pool:
        jobs.run("a")
        jobs.said.append("break")
        with pytest.raises(EngineGone):
            jobs.run("b", scheduler__family="ddpm")
        assert jobs.run("c") == (None, LOADED_MS)


def test_in_one_process_an_engine_is_alone() -> None:
    jobs = Jobs()
    with jobs.pool:
        jobs.run("a", launch__mode=LaunchMode.inprocess, launch__reuse=3)
        jobs.run("b", launch__mode=LaunchMode.inprocess, launch__reuse=3, launch__threads_per_rank=1)
        assert jobs.said == ["start a", "stop a", "start b"]


@pytest.mark.parametrize(("seed", "ends"), [(1, False), (2, True)])
def test_ranks_are_used_again_only_where_a_failure_left_them_as_they_were(seed: int, ends: bool) -> None:
    jobs = Jobs()
    with jobs.pool:
        with pytest.raises(RequestFailed):
            jobs.run("a", request__seed=seed)
        assert ("stop a" in jobs.said) == ends
        assert jobs.run("b") == ((None, LOADED_MS) if ends else ("a", 0.0))
