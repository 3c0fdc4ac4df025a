"""The supervisor over engines that are threads: every request has one answer, whatever happens to the ranks."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from harness.config.schema import RunConfig
from harness.config.serve import Policy
from harness.messages import Failure, GenerationRequest, GenerationResult, Progress
from harness.serving.transport import EngineGone
from harness.tasks.serve.jobs import GenerationJob
from harness.tasks.serve.supervisor import NotServing, QueueFull, Supervisor
from tests.fixtures.serving.thread_engine import Fleet

pytestmark = pytest.mark.anyio
STEPS = 5
LIMIT_S = 20.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def make_request(name: str, prompt: str = "rocket", steps: int = STEPS, **changes: float) -> GenerationRequest:
    return GenerationRequest(name, [prompt], steps, 1.0, 2, 2, **changes)  # type: ignore[arg-type]


def configured(**serve: object) -> RunConfig:
    config = RunConfig()
    for key, value in serve.items():
        setattr(config.serve, key, value)
    return config


@asynccontextmanager
async def serving(folder: Path, fleet: Fleet, **serve: object) -> AsyncIterator[Supervisor]:
    """Yield a ready supervisor; at the end nothing of its engines is left."""
    (folder / "logs").mkdir()
    supervisor = Supervisor(configured(**serve), folder, fleet.make)
    supervisor.WATCH_S = 0.02
    try:
        async with asyncio.timeout(LIMIT_S):
            await supervisor.start()
            yield supervisor
    finally:
        await supervisor.stop()
        assert not fleet.alive


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def kinds(jobs: list[GenerationJob]) -> list[str | None]:
    return [None if job.failure is None else job.failure.kind for job in jobs]


async def test_requests_are_generated_in_order_and_each_has_its_own_image(tmp_path: Path) -> None:
    fleet = Fleet()
    async with serving(tmp_path, fleet) as supervisor:
        assert (supervisor.state, supervisor.reason) == ("ready", "")
        jobs = [supervisor.submit(make_request(name, seed=number)) for number, name in enumerate("abcd")]
        assert [job.ahead for job in jobs] == [0, 1, 2, 3]
        await jobs[0].wait()
        await until(lambda: jobs[1].state == "running")
        assert [job.ahead for job in jobs] == [0, 0, 1, 2]
        for job in jobs:
            await job.wait()
    assert fleet.generated == list("abcd")
    assert [job.pixels[0].max() for job in jobs] == [0, 1, 2, 3]
    assert all(job.state == "done" and (job.done, job.total) == (STEPS, STEPS) for job in jobs)
    assert all(job.arrived <= (job.began or 0) <= (job.ended or 0) for job in jobs)


async def test_every_change_is_reported_and_the_answer_is_the_last(tmp_path: Path) -> None:
    async with serving(tmp_path, Fleet()) as supervisor:
        job = supervisor.submit(make_request("a"))
        events = [(seen.state, seen.stage, seen.done) async for seen in job.events()]
        assert [(seen.state, seen.done) async for seen in job.events()] == [("done", STEPS)]
    assert events[0] == ("queued", "queued", 0)
    assert events[-1] == ("done", "denoising", STEPS)
    assert [done for *_, done in events] == sorted(done for *_, done in events)
    assert len(set(events)) > 3


async def test_a_slow_reader_misses_changes_but_never_the_answer() -> None:
    job, events = GenerationJob(make_request("a")), []
    async for seen in job.events():
        events.append((seen.state, seen.done))
        if not job.answered:
            job.on_progress(Progress("a", "denoising", len(events), 3))
        if len(events) == 2:
            job.on_progress(Progress("a", "decoding", 0, 0))
            job.finish(GenerationResult("a", [], [], 1.0), [])
    assert events == [("queued", 0), ("running", 1), ("done", 2)]


async def test_one_request_more_than_may_wait_gets_a_retry_time(tmp_path: Path) -> None:
    async with serving(tmp_path, Fleet(), max_queue=2) as supervisor:
        first = supervisor.submit(make_request("first", steps=10_000))
        await until(lambda: first.state == "running")
        waiting = [supervisor.submit(make_request(name)) for name in "ab"]
        with pytest.raises(QueueFull, match=r"serve.max_queue") as caught:
            supervisor.submit(make_request("c"))
        assert caught.value.retry_after_s > 0
        assert "c" not in supervisor.jobs
        supervisor.cancel("first")
        await waiting[0].wait()
        await supervisor.submit(make_request("c")).wait()


async def test_the_place_in_the_queue_is_that_of_the_policy(tmp_path: Path) -> None:
    async with serving(tmp_path, Fleet(), policy=Policy.shortest) as supervisor:
        first = supervisor.submit(make_request("first", steps=10_000))
        await until(lambda: first.state == "running")
        assert [supervisor.submit(make_request(f"{steps}", steps=steps)).ahead for steps in (300, 100, 200)] == [
            1,
            1,
            2,
        ]
        assert {name: job.ahead for name, job in supervisor.jobs.items()} == {"first": 0, "300": 3, "100": 1, "200": 2}


async def test_an_id_is_one_request(tmp_path: Path) -> None:
    async with serving(tmp_path, Fleet()) as supervisor:
        supervisor.submit(make_request("a"))
        with pytest.raises(ValueError, match="give it another id"):
            supervisor.submit(make_request("a"))


async def test_a_request_is_cancelled_while_it_waits_and_while_it_runs(tmp_path: Path) -> None:
    fleet = Fleet()
    async with serving(tmp_path, fleet) as supervisor:
        generated, waiting, last = (supervisor.submit(make_request(name, steps=10_000)) for name in "abc")
        await until(lambda: generated.done > 0)
        assert supervisor.cancel("b")
        assert waiting.state == "failed"
        assert last.ahead == 1
        assert supervisor.cancel("a")
        await generated.wait()
        await until(lambda: last.state == "running")
        assert supervisor.cancel("c")
        await last.wait()
        assert not supervisor.cancel("c")
        assert not supervisor.cancel("never was")
        assert kinds([generated, waiting, last]) == ["cancelled"] * 3
        await supervisor.submit(make_request("d")).wait()
    assert fleet.generated == ["d"]


async def test_ranks_that_die_answer_what_they_finished_and_the_next_ones_run_what_waited(tmp_path: Path) -> None:
    fleet = Fleet(load_s=0.3)
    async with serving(tmp_path, fleet) as supervisor:
        (tmp_path / "logs" / "rank1.error.json").touch()
        lost = supervisor.submit(make_request("lost", "die"))
        waiting = [supervisor.submit(make_request(name)) for name in "ab"]
        await lost.wait()
        assert (supervisor.state, supervisor.reason, supervisor.info) == (
            "restarting",
            "rank 1 died with SIGKILL",
            None,
        )
        assert lost.failure is not None
        assert (lost.failure.kind, lost.failure.message) == ("failed", "rank 1 died with SIGKILL")
        assert lost.failure.retry_after_s is not None
        waiting.append(supervisor.submit(make_request("c")))
        waiting[1:2] = []
        assert supervisor.cancel("b")
        for job in waiting:
            await job.wait()
        assert (supervisor.state, supervisor.restarts, len(fleet.lives)) == ("ready", 1, 2)
    assert fleet.generated == ["a", "c"]
    assert [path.name for path in (tmp_path / "logs").rglob("*")] == ["died1", "rank1.error.json"]


async def test_a_request_that_ranks_choke_on_is_not_given_to_a_third_set(tmp_path: Path) -> None:
    fleet = Fleet()
    async with serving(tmp_path, fleet, restarts=3) as supervisor:
        first = supervisor.submit(make_request("first", steps=10))
        await until(lambda: first.state == "running")
        before, poison, *after = (
            supervisor.submit(make_request(name, "choke" if name == "b" else "")) for name in "abcd"
        )
        for job in (first, before, poison, *after):
            await job.wait()
        assert kinds([first, before, poison, *after]) == ["failed", None, "failed", None, None]
        assert poison.failure is not None
        assert "whenever they were given this request" in poison.failure.message
        assert (supervisor.state, len(fleet.lives)) == ("ready", 3)
    assert fleet.generated == ["a", "c", "d"]


async def test_an_answer_that_is_on_its_way_at_the_death_counts(tmp_path: Path) -> None:
    fleet = Fleet()
    async with serving(tmp_path, fleet) as supervisor:
        jobs = [supervisor.submit(make_request(name, "answer and die")) for name in "ab"]
        for job in jobs:
            await job.wait()
        await until(lambda: supervisor.restarts == 2)
    assert kinds(jobs) == [None, None]
    assert fleet.generated == ["a", "b"]


async def test_a_failure_of_one_request_is_its_own(tmp_path: Path) -> None:
    fleet = Fleet()
    async with serving(tmp_path, fleet) as supervisor:
        jobs = [supervisor.submit(make_request("a", "oom")), supervisor.submit(make_request("b"))]
        for job in jobs:
            await job.wait()
        assert jobs[0].failure == Failure("a", "oom", "out of memory", 1)
        assert (supervisor.state, supervisor.restarts) == ("ready", 0)
    assert fleet.generated == ["b"]


@pytest.mark.parametrize("prompt", ["hang", "mute"])
async def test_ranks_that_have_stopped_are_replaced(tmp_path: Path, prompt: str) -> None:
    fleet = Fleet()
    async with serving(tmp_path, fleet) as supervisor:
        supervisor.GRACE_S = supervisor.PING_S = 0.1
        supervisor._hangs.patience_s = 0.5 if prompt == "hang" else 600.0
        lost, waiting = supervisor.submit(make_request("lost", prompt)), supervisor.submit(make_request("a"))
        await lost.wait()
        await waiting.wait()
    says = {"hang": "rank 0 reported nothing about its requests for 0.5 s", "mute": "rank 0 answered no ping for 1 s"}
    assert lost.failure is not None
    assert says[prompt] in lost.failure.message
    assert fleet.generated == ["a"]


async def test_more_deaths_than_allowed_end_the_server_and_all_clients_get_an_answer(tmp_path: Path) -> None:
    fleet = Fleet(stillborn=(2,))
    async with serving(tmp_path, fleet, restarts=2) as supervisor:
        lost = [supervisor.submit(make_request(name, "die")) for name in "ab"]
        waiting = supervisor.submit(make_request("c"))
        for job in (*lost, waiting):
            await job.wait()
        assert kinds([*lost, waiting]) == ["failed"] * 3
        assert (supervisor.state, supervisor.restarts, len(fleet.lives)) == ("failed", 1, 3)
        assert "serve.restarts=2 allows in 600 s" in supervisor.reason
        assert waiting.failure is not None
        assert "no such checkpoint" in waiting.failure.message
        with pytest.raises(NotServing, match="no such checkpoint"):
            supervisor.submit(make_request("d"))
    assert supervisor.state == "failed"


async def test_deaths_that_lie_far_apart_do_not_add_up(tmp_path: Path) -> None:
    fleet = Fleet(load_s=0.1)
    async with serving(tmp_path, fleet, restarts=1, restart_window_s=0.05) as supervisor:
        for name in "abc":
            await supervisor.submit(make_request(name, "die")).wait()
            await until(lambda: supervisor.state == "ready")
        assert supervisor.restarts == 3


async def test_a_deadline_counts_from_the_arrival_also_where_no_rank_is_there(tmp_path: Path) -> None:
    fleet = Fleet(load_s=0.3)
    async with serving(tmp_path, fleet, timeout_s=50.0) as supervisor:
        supervisor.GRACE_S = 0.1
        lost = supervisor.submit(make_request("lost", "die"))
        expired, kept = (
            supervisor.submit(make_request("a", timeout_s=0.15)),
            supervisor.submit(make_request("b", timeout_s=100.0)),
        )
        await lost.wait()
        await expired.wait()
        assert supervisor.state == "restarting"
        await kept.wait()
        late = supervisor.submit(make_request("c", steps=10_000, timeout_s=0.2))
        await late.wait()
    assert kinds([expired, kept, late]) == ["expired", None, "expired"]
    again = [request.timeout_s or 0 for request in fleet.seen if request.request_id == "b"]
    assert len(again) == 2
    assert again[1] + 0.2 < again[0] <= 50


async def test_a_stop_answers_everything_and_leaves_no_engine(tmp_path: Path) -> None:
    fleet = Fleet()
    async with serving(tmp_path, fleet) as supervisor:
        jobs = [supervisor.submit(make_request(name, steps=10_000)) for name in "ab"]
        await until(lambda: jobs[0].state == "running")
        await asyncio.gather(supervisor.stop(), supervisor.stop())
        assert kinds(jobs) == ["cancelled"] * 2
        assert supervisor.state == "stopping"
        with pytest.raises(NotServing):
            supervisor.submit(make_request("c"))


async def test_a_stop_while_ranks_load_ends_the_wait(tmp_path: Path) -> None:
    fleet = Fleet(load_s=15.0)
    supervisor = Supervisor(configured(), tmp_path, fleet.make)
    starting = asyncio.create_task(supervisor.start())
    await asyncio.sleep(0.05)
    job = supervisor.submit(make_request("a"))
    await asyncio.wait_for(supervisor.stop(), 5)
    with pytest.raises(EngineGone, match="stop"):
        await starting
    assert kinds([job]) == ["cancelled"]
    assert not fleet.alive


async def test_ranks_that_never_were_ready_are_not_started_again(tmp_path: Path) -> None:
    fleet = Fleet(stillborn=(0,))
    supervisor = Supervisor(configured(), tmp_path, fleet.make)
    with pytest.raises(EngineGone, match="no such checkpoint"):
        await supervisor.start()
    assert (supervisor.state, supervisor.reason) == ("failed", "rank 0: no such checkpoint")
    assert len(fleet.lives) == 1
    assert not fleet.alive


async def test_only_the_last_answered_jobs_are_kept(tmp_path: Path) -> None:
    async with serving(tmp_path, Fleet(), max_stored_results=2) as supervisor:
        for name in "abcd":
            await supervisor.submit(make_request(name, steps=1)).wait()
        assert list(supervisor.jobs) == ["c", "d"]


async def test_an_answer_is_given_once() -> None:
    job = GenerationJob(make_request("a"))
    job.fail(Failure("a", "cancelled", "the request was cancelled"))
    with pytest.raises(RuntimeError, match="already been answered"):
        job.finish(GenerationResult("a", [], [], 1.0), [])
    assert (job.state, job.answer) == ("failed", None)
