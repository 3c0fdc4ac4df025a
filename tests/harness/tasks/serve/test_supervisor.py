"""The supervisor over engines that are threads: every request has one answer, whatever happens to the ranks."""

import asyncio
import errno
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from harness.config.schema import RunConfig
from harness.messages import Failure, GenerationResult, Progress
from harness.serving.transport import EngineGone
from harness.tasks.serve import restarts
from harness.tasks.serve.jobs import GenerationJob
from harness.tasks.serve.ranks import RankSession
from harness.tasks.serve.supervisor import NotServing, QueueFull, Supervisor
from tests.fixtures.serving.fake_engine import make_request
from tests.fixtures.serving.thread_engine import Fleet

pytestmark = pytest.mark.anyio
STEPS = 5
LIMIT_S = 20.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


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


async def test_ranks_are_given_no_more_than_their_queue_holds(tmp_path: Path) -> None:
    """They would refuse the rest, which the server has accepted."""
    fleet = Fleet()
    async with serving(tmp_path, fleet, max_queue=2) as supervisor:
        first = supervisor.submit(make_request("first", steps=10_000))
        await until(lambda: first.state == "running")
        for name in "ab":
            supervisor.submit(make_request(name))
        supervisor.cancel("a")  # the ranks do not know it yet
        late = supervisor.submit(make_request("c"))
        assert list(supervisor._open.sent) == ["first", "a", "b"]
        fleet.lives[0].from_outside, fleet.lives[0].death = True, "rank 1 died with SIGKILL"
        await until(lambda: len(fleet.lives) == 2 and bool(supervisor._open.sent))
        assert list(supervisor._open.sent)[:2] == ["first", "b"]  # a third one as soon as the first one runs
        await until(lambda: len(supervisor._open.sent) == 3)
        supervisor.cancel("first")
        await late.wait()
        assert late.state == "done"


async def test_the_place_in_the_queue_is_that_of_the_policy(tmp_path: Path) -> None:
    async with serving(tmp_path, Fleet(), policy="shortest") as supervisor:
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
        with pytest.raises(ValueError, match="the new one is refused and the first goes on"):
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


async def test_what_ranks_had_at_their_death_is_generated_again(tmp_path: Path) -> None:
    """The client sees its job queued again, and a death that happens once is nobody's fault."""
    fleet = Fleet(load_s=0.3)
    async with serving(tmp_path, fleet) as supervisor:
        (tmp_path / "logs" / "rank1.error.json").touch()
        lost = supervisor.submit(make_request("lost", steps=20))
        waiting = [supervisor.submit(make_request(name)) for name in "ab"]
        await until(lambda: lost.done > 1)
        fleet.lives[0].death = "rank 1 died with SIGKILL"
        await until(lambda: lost.state == "queued")
        assert (lost.done, lost.began, lost.stage) == (0, None, "queued")
        assert [job.ahead for job in (lost, *waiting)] == [0, 1, 2]
        assert (supervisor.state, supervisor.reason) == ("restarting", "rank 1 died with SIGKILL")
        assert supervisor.info is None
        waiting.append(supervisor.submit(make_request("c")))
        assert supervisor.cancel("b")
        for job in (lost, *waiting):
            await job.wait()
        assert kinds([lost, *waiting]) == [None, None, "cancelled", None]
        assert (supervisor.state, supervisor.restarts, len(fleet.lives)) == ("ready", 1, 2)
    assert fleet.generated == ["lost", "a", "c"]
    assert [path.name for path in (tmp_path / "logs").rglob("*")] == ["died1", "rank1.error.json"]


async def test_a_request_that_kills_its_ranks_twice_is_answered_and_its_neighbours_are_generated(
    tmp_path: Path,
) -> None:
    fleet = Fleet()
    async with serving(tmp_path, fleet, restarts=3) as supervisor:
        first = supervisor.submit(make_request("first", steps=10))
        await until(lambda: first.state == "running")
        before, poison, *after = (
            supervisor.submit(make_request(name, "choke" if name == "b" else "")) for name in "abcd"
        )
        for job in (first, before, poison, *after):
            await job.wait()
        assert kinds([first, before, poison, *after]) == [None, None, "failed", None, None]
        assert poison.failure is not None
        assert "the ranks died twice with this request" in poison.failure.message
        assert poison.failure.retry_after_s is None
        assert (supervisor.state, len(fleet.lives)) == ("ready", 3)
    assert fleet.generated == ["first", "a", "c", "d"]


@pytest.mark.parametrize("prompt", ["die", "silent die", "choke"])
async def test_many_requests_that_kill_ranks_do_not_end_the_service(tmp_path: Path, prompt: str) -> None:
    """Each one costs two sets of ranks; a death that one request explains is not counted."""
    fleet = Fleet()
    async with serving(tmp_path, fleet, restarts=2) as supervisor:
        for number in range(3):
            poison = supervisor.submit(make_request(f"poison {number}", prompt))
            good = supervisor.submit(make_request(f"good {number}"))
            await poison.wait()
            await good.wait()
            assert kinds([poison, good]) == ["failed", None]
        assert len(fleet.lives) == 7
        assert supervisor.state == "ready"


async def test_suspects_are_generated_alone_and_one_that_is_answered_is_none_any_more(tmp_path: Path) -> None:
    fleet = Fleet()
    async with serving(tmp_path, fleet) as supervisor:
        suspect = supervisor.submit(make_request("suspect", steps=20))
        await until(lambda: suspect.done > 0)
        fleet.lives[0].death = "rank 0 died with SIGKILL"
        await until(lambda: suspect.state == "queued")
        stranger = supervisor.submit(make_request("stranger"))
        await until(lambda: suspect.state == "running")
        assert [request.request_id for request in fleet.seen] == ["suspect", "suspect"]
        await suspect.wait()
        await stranger.wait()
        later = supervisor.submit(make_request("later", steps=20))
        await until(lambda: later.done > 0)
        fleet.lives[1].death = "rank 0 died with SIGKILL"
        await later.wait()
        assert kinds([suspect, stranger, later]) == [None, None, None]


async def test_a_rank_that_somebody_kills_makes_suspects_only_the_second_time(tmp_path: Path) -> None:
    fleet = Fleet()
    async with serving(tmp_path, fleet) as supervisor:
        first = supervisor.submit(make_request("first", steps=40))
        second = supervisor.submit(make_request("second"))
        for number in (0, 1):
            await until(lambda: first.done > 0)
            fleet.lives[number].from_outside, fleet.lives[number].death = True, "rank 0 died with SIGKILL"
            await until(lambda: len(fleet.lives) == number + 2 and first.state == "running")  # noqa: B023
            assert [*supervisor._open.sent] == (["first", "second"] if number == 0 else ["first"])
        await first.wait()
        await second.wait()
        assert kinds([first, second]) == [None, None]


async def test_a_cancelled_request_is_answered_by_the_end_of_ranks_that_hang(tmp_path: Path) -> None:
    fleet = Fleet()
    async with serving(tmp_path, fleet) as supervisor:
        supervisor._watch.hangs.hang_s = 0.5
        job = supervisor.submit(make_request("a", "hang"))
        await until(lambda: job.done == 1)
        await asyncio.sleep(0.1)  # it hangs in its second step
        assert supervisor.cancel("a")
        await job.wait()
        assert kinds([job]) == ["cancelled"]
        await until(lambda: supervisor.restarts == 1)
        await supervisor.submit(make_request("b")).wait()
    assert fleet.generated == ["b"]


async def test_troubles_of_the_server_are_tried_again_and_blame_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "LONGEST_PAUSE_S", 0.05)
    fleet = Fleet(troubled=(1, 2, 3, 4))
    async with serving(tmp_path, fleet, restarts=0) as supervisor:
        job = supervisor.submit(make_request("a", steps=20))
        await until(lambda: job.done > 0)
        shutil.rmtree(tmp_path / "logs")
        (tmp_path / "logs").touch()  # no folder can be made here
        fleet.lives[0].death = "rank 0 died with SIGKILL"
        await until(lambda: "Too many open files" in supervisor.reason)
        assert supervisor.state == "restarting"
        await job.wait()
        assert kinds([job]) == [None]
        assert len(fleet.lives) == 6


async def test_a_trouble_of_one_duty_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankSession, "TROUBLE_S", 0.01)
    fleet = Fleet()
    async with serving(tmp_path, fleet) as supervisor:

        def check_alive() -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        fleet.lives[0].check_alive = check_alive  # type: ignore[method-assign]
        await asyncio.sleep(0.1)
        await supervisor.submit(make_request("a")).wait()
        assert (supervisor.state, len(fleet.lives)) == ("ready", 1)
    assert fleet.generated == ["a"]


async def test_a_server_that_was_stopped_does_not_blame_its_ranks(tmp_path: Path) -> None:
    """The clock jumps as it does over SIGSTOP and SIGCONT: the time does not count, and what came is read first."""
    fleet = Fleet()
    async with serving(tmp_path, fleet) as supervisor:
        supervisor._watch.hangs.hang_s = 1.0
        job = supervisor.submit(make_request("a", "hang"))
        await until(lambda: job.done == 1)
        time.sleep(3.0)  # the whole event loop stands still
        await asyncio.sleep(1.5)
        assert (supervisor.state, len(fleet.lives)) == ("ready", 1)
        supervisor.cancel("a")
        await until(lambda: len(fleet.lives) == 2)  # it does hang


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
async def test_ranks_that_have_stopped_are_replaced(
    tmp_path: Path, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet()
    monkeypatch.setattr(RankSession, "PING_S", 0.1)
    async with serving(tmp_path, fleet) as supervisor:
        supervisor._watch.hangs.hang_s = 0.5 if prompt == "hang" else 600.0
        lost, waiting = supervisor.submit(make_request("lost", prompt)), supervisor.submit(make_request("a"))
        await lost.wait()
        await waiting.wait()
    says = {"hang": "the ranks made no progress in denoising", "mute": "rank 0 answered no ping for 1 s"}
    assert lost.failure is not None
    assert says[prompt] in lost.failure.message
    assert fleet.generated == ["a"]


async def test_more_deaths_than_allowed_are_a_failure_that_is_left_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "LONGEST_PAUSE_S", 0.2)
    fleet = Fleet(stillborn=(1, 2, 3, 4))
    async with serving(tmp_path, fleet, restarts=2) as supervisor:
        job = supervisor.submit(make_request("a", steps=20))
        await until(lambda: job.done > 0)
        fleet.lives[0].death = "rank 1 died with SIGKILL"
        await until(lambda: supervisor.state == "failed")
        assert "serve.restarts=2 allows in 600 s" in supervisor.reason
        assert "no such checkpoint" in supervisor.reason
        with pytest.raises(NotServing, match="no such checkpoint") as caught:
            supervisor.submit(make_request("d"))
        assert 0 < caught.value.retry_after_s < 60
        await job.wait()
        assert kinds([job]) == [None]
        assert (supervisor.state, supervisor.restarts, len(fleet.lives)) == ("ready", 1, 6)
        assert not supervisor.gave_up.is_set()


async def test_a_server_may_end_when_its_ranks_have_failed(tmp_path: Path) -> None:
    fleet = Fleet()
    async with serving(tmp_path, fleet, restarts=0, exit_when_failed=True) as supervisor:
        job = supervisor.submit(make_request("a", steps=20))
        await until(lambda: job.done > 0)
        fleet.lives[0].death = "rank 1 died with SIGKILL"
        await supervisor.gave_up.wait()
        assert supervisor.state == "failed"
        assert kinds([job]) == ["not_serving"]


async def test_deaths_that_lie_far_apart_do_not_add_up(tmp_path: Path) -> None:
    fleet = Fleet(load_s=0.1)
    async with serving(tmp_path, fleet, restarts=1, restart_window_s=0.05) as supervisor:
        for number in range(3):
            fleet.lives[number].death = "rank 1 died with SIGKILL"
            await until(lambda number=number: supervisor.restarts == number + 1)  # type: ignore[misc]
            assert supervisor.state == "ready"


async def test_a_deadline_counts_from_the_arrival_also_where_no_rank_is_there(tmp_path: Path) -> None:
    fleet = Fleet(load_s=0.3)
    async with serving(tmp_path, fleet, timeout_s=50.0) as supervisor:
        supervisor.GRACE_S = 0.1
        expired, kept = (
            supervisor.submit(make_request("a", timeout_s=0.2)),
            supervisor.submit(make_request("b", timeout_s=100.0)),
        )
        fleet.lives[0].death = "rank 1 died with SIGKILL"
        await until(lambda: supervisor.state == "restarting")
        await expired.wait()
        assert supervisor.state == "restarting"
        await kept.wait()
        late = supervisor.submit(make_request("c", steps=10_000, timeout_s=0.2))
        await late.wait()
    assert kinds([expired, kept, late]) == ["expired", None, "expired"]
    again = [request.timeout_s or 0 for request in fleet.seen if request.request_id == "b"]
    assert len(again) == 2
    assert again[1] + 0.2 < again[0] <= 50  # the load of the next ranks


async def test_a_stop_answers_everything_and_leaves_no_engine(tmp_path: Path) -> None:
    fleet = Fleet()
    async with serving(tmp_path, fleet) as supervisor:
        jobs = [supervisor.submit(make_request(name, steps=10_000)) for name in "ab"]
        await until(lambda: jobs[0].state == "running")
        await asyncio.gather(supervisor.stop(), supervisor.stop())
        assert kinds(jobs) == ["not_serving"] * 2
        assert [job.failure.retry_after_s for job in jobs if job.failure] == [1.0, 1.0]
        assert supervisor.state == "stopping"
        with pytest.raises(NotServing):
            supervisor.submit(make_request("c"))


async def test_a_stop_lets_what_runs_end_and_refuses_the_rest_at_once(tmp_path: Path) -> None:
    fleet = Fleet()
    async with serving(tmp_path, fleet) as supervisor:
        short, waiting = supervisor.submit(make_request("a", steps=20)), supervisor.submit(make_request("b"))
        await until(lambda: short.state == "running")
        stopping = asyncio.create_task(supervisor.stop(drain_s=LIMIT_S))
        await waiting.wait()
        assert (short.state, supervisor.state) == ("running", "stopping")
        with pytest.raises(NotServing):
            supervisor.submit(make_request("c"))
        await stopping
        assert kinds([short, waiting]) == [None, "not_serving"]


async def test_a_stop_waits_no_longer_than_it_may_and_not_at_all_once_it_is_aborted(tmp_path: Path) -> None:
    for number, drain_s in enumerate((0.2, LIMIT_S)):
        fleet, folder = Fleet(), tmp_path / str(number)
        folder.mkdir()
        async with serving(folder, fleet) as supervisor:
            job = supervisor.submit(make_request("a", steps=100_000))
            await until(lambda job=job: job.state == "running")  # type: ignore[misc]
            stopping = asyncio.create_task(supervisor.stop(drain_s))
            await asyncio.sleep(0.1)
            assert not job.answered
            if number:
                supervisor.abort()
            await asyncio.wait_for(stopping, 5)
            assert kinds([job]) == ["not_serving"]
            assert not fleet.alive


async def test_a_stop_while_ranks_load_ends_the_wait(tmp_path: Path) -> None:
    fleet = Fleet(load_s=15.0)
    supervisor = Supervisor(configured(), tmp_path, fleet.make)
    starting = asyncio.create_task(supervisor.start())
    await asyncio.sleep(0.05)
    job = supervisor.submit(make_request("a"))
    await asyncio.wait_for(supervisor.stop(), 5)
    with pytest.raises(EngineGone, match="stop"):
        await starting
    assert kinds([job]) == ["not_serving"]
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
