"""Real ranks are killed, stopped, raise or run out of memory under a server.

Each request gets its one answer in time, new ranks generate what waited, and no process is left.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from harness.config.schema import RunConfig
from harness.engines.torchrun import TorchrunEngine
from harness.messages import Failure
from harness.resolve.compose import compose_run, to_yaml
from harness.resolve.request import to_message
from harness.tasks.serve.jobs import GenerationJob
from harness.tasks.serve.supervisor import Supervisor
from tests.fixtures.commands import LIMIT_S, QUICK, processes_about
from tests.fixtures.faults import poisoned

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
LONG = 10_000
ANSWERED_S = 30.0  # from a fault to the typed answer, beyond launch.collective_timeout_s
FLOOR = 1e-3  # of float32 pixels in [0, 1], between batches of different sizes


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def serving(tmp_path: Path, *overrides: str) -> AsyncIterator[Supervisor]:
    folder, engines = tmp_path / "run", list[TorchrunEngine]()
    config = compose_run([*QUICK, "task=serve", f"serve.max_steps={LONG}", *overrides]).config
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))

    def make(config: RunConfig, folder: Path) -> TorchrunEngine:
        engines.append(TorchrunEngine(config, folder))
        return engines[-1]

    supervisor = Supervisor(config, folder, make)
    try:
        async with asyncio.timeout(2 * LIMIT_S):
            await supervisor.start()
            yield supervisor
    finally:
        await supervisor.stop()
        assert not processes_about(folder)
        assert not any(engine.addresses.folder.exists() for engine in engines)


def submitted(supervisor: Supervisor, name: str, *prompts: str, steps: int = 2) -> GenerationJob:
    """Return a request whose images are generated in one batch."""
    request = to_message(supervisor._config.request)
    changes = {"request_id": name, "prompts": list(prompts), "steps": steps, "batch_size": len(prompts)}
    return supervisor.submit(msgspec.structs.replace(request, **changes))


async def running(supervisor: Supervisor, number: int) -> list[GenerationJob]:
    """Submit requests that fill both replicas and never end."""
    jobs = [submitted(supervisor, f"lost {number}{n}", "rocket", "pizza", steps=LONG) for n in "ab"]
    await until(lambda: all(job.done > 0 for job in jobs))
    return jobs


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.02)


async def failure_of(job: GenerationJob, limit_s: float = ANSWERED_S) -> Failure:
    """Return the failure of a job, which must be answered in time."""
    began = time.monotonic()
    await asyncio.wait_for(job.wait(), limit_s)
    print(f"{job.request.request_id}: {job.failure} after {time.monotonic() - began:.1f} s")
    assert job.failure is not None
    return job.failure


async def queued_again(supervisor: Supervisor, lost: list[GenerationJob]) -> None:
    """Wait until jobs are queued again because their ranks are gone."""
    async with asyncio.timeout(ANSWERED_S):
        await until(lambda: all(job.state == "queued" for job in lost))
    assert (supervisor.state, supervisor.info) == ("restarting", None)


async def cancelled(supervisor: Supervisor, lost: list[GenerationJob]) -> None:
    """Cancel jobs that wait."""
    for job in lost:
        assert supervisor.cancel(job.request.request_id)
        assert (await failure_of(job)).kind == "cancelled"


def rank(supervisor: Supervisor, number: int) -> int:
    """Return the process id of a rank."""
    assert supervisor.info is not None
    return supervisor.info.pids[number]


async def generated_as_before(supervisor: Supervisor, waiting: list[GenerationJob]) -> None:
    """The new ranks generate what waited, and generate it again with the same pixels."""
    for job in waiting:
        await job.wait()
        assert job.state == "done", job.failure
    again = submitted(supervisor, f"again {supervisor.restarts}", *waiting[0].request.prompts)
    await again.wait()
    assert all(np.allclose(job.pixels[0], again.pixels[0], atol=FLOOR) for job in waiting)
    assert supervisor.state == "ready"


async def test_a_rank_that_is_killed_and_faults_that_only_their_request_suffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", poisoned(tmp_path, rank=0)["PYTHONPATH"])
    async with serving(tmp_path, "parallel=dp2", "serve.max_batch=2") as supervisor:
        failures = [await failure_of(submitted(supervisor, prompt, prompt)) for prompt in ("raises", "no memory")]
        assert [(failure.kind, failure.rank) for failure in failures] == [("failed", 0), ("oom", 0)]
        assert supervisor.restarts == 0
        lost = await running(supervisor, 1)
        waiting = [submitted(supervisor, name, "pizza") for name in "ab"]
        assert [job.ahead for job in waiting] == [2, 3]
        os.kill(rank(supervisor, 1), signal.SIGKILL)
        await queued_again(supervisor, lost)
        assert "rank 1 died with SIGKILL" in supervisor.reason
        assert [job.state for job in waiting] == ["queued", "queued"]
        assert [job.ahead for job in waiting] == [2, 3]
        await cancelled(supervisor, lost)
        waiting.append(submitted(supervisor, "c", "pizza"))
        await generated_as_before(supervisor, waiting)
        assert supervisor.restarts == 1


async def test_a_rank_that_raises_among_others_ends_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", poisoned(tmp_path)["PYTHONPATH"])
    async with serving(tmp_path, "parallel=ulysses2", "serve.max_batch=1") as supervisor:
        for number, (prompt, kind, says) in enumerate(
            [("raises", "failed", "rank 1: planted fault"), ("no memory", "oom", "rank 1: RuntimeError")], start=1
        ):
            lost, waiting = submitted(supervisor, prompt, prompt), submitted(supervisor, f"{prompt} waits", "pizza")
            failure = await failure_of(lost)
            assert failure.kind == kind
            assert says in failure.message
            assert "twice with this request" in failure.message
            assert supervisor.state == "restarting"
            assert says in supervisor.reason
            await generated_as_before(supervisor, [waiting])
            assert supervisor.restarts == 2 * number


async def test_ranks_that_are_stopped_are_found_and_replaced(tmp_path: Path) -> None:
    async with serving(tmp_path, "parallel=dp2", "serve.max_batch=2") as supervisor:
        for number in (1, 0):
            lost = await running(supervisor, number)
            waiting = submitted(supervisor, f"waits {number}", "pizza")
            os.kill(rank(supervisor, number), signal.SIGSTOP)
            await queued_again(supervisor, lost)
            assert "was stopped by a signal" in supervisor.reason or "they hang" in supervisor.reason
            await cancelled(supervisor, lost)
            await generated_as_before(supervisor, [waiting])
        assert supervisor.restarts == 2
