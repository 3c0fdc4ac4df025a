"""The life of the server's process over engines that are threads: its signals, its ends and its status."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from harness.records.record import RunFolder, Status
from harness.resolve.compose import ResolvedRun, compose_run
from harness.serving.transport import EngineGone
from harness.tasks.serve.serve import listen, serve, server_url
from tests.fixtures.commands import wait_for
from tests.fixtures.serving.thread_engine import Fleet

LIMIT_S = 20.0


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Restore what a server sets for its whole process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers, mask = [signal.getsignal(number) for number in numbers], os.umask(0o022)
    yield
    os.umask(mask)
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def run_server(tmp_path: Path, fleet: Fleet, act: Callable[[str], None] | None, *overrides: str) -> Status:
    """Run a server in this thread, and do something to it in another one once it is ready."""
    run = ResolvedRun(compose_run(["task=serve", "serve.port=0", *overrides]).config)
    folder = RunFolder.claim(tmp_path / "run")
    with listen(run.config.serve) as listening:
        url = server_url(listening)

        def when_ready() -> None:
            if act is not None:
                wait_for(lambda: httpx.get(f"{url}/ready").status_code == 200, "the server", LIMIT_S)
                act(url)

        thread = threading.Thread(target=when_ready, daemon=True)
        thread.start()
        status = serve(run, folder, listening, fleet.make)
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    assert not fleet.alive
    return status


def interrupt(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def submit(url: str, steps: int) -> str:
    body = {"prompt": "rocket", "triptych": {"steps": steps}}
    request_id: str = httpx.post(f"{url}/v1/requests", json=body).json()["id"]
    return request_id


def status_of(url: str, request_id: str) -> str:
    status: str = httpx.get(f"{url}/v1/requests/{request_id}").json()["status"]
    return status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_lets_what_runs_end(tmp_path: Path, number: signal.Signals) -> None:
    found: dict[str, object] = {}

    def act(url: str) -> None:
        running, waiting = submit(url, 100), submit(url, 5)
        wait_for(lambda: status_of(url, running) == "running", "its start", LIMIT_S)
        interrupt(number)
        wait_for(lambda: status_of(url, waiting) == "failed", "the answer to what waits", LIMIT_S)
        found["running"] = status_of(url, running)
        for path in ("/ready", "/health"):
            found[path] = httpx.get(f"{url}{path}").status_code
        found["new"] = httpx.post(f"{url}/v1/images/generations", json={"prompt": "x"}).status_code

    fleet = Fleet()
    assert run_server(tmp_path, fleet, act, "serve.max_steps=100") == Status("ok")
    assert found["running"] == "running"
    assert (found["/ready"], found["new"]) == (503, 503)
    assert len(fleet.generated) == 1


def test_a_second_interrupt_waits_for_nothing(tmp_path: Path) -> None:
    began: list[float] = []

    def act(url: str) -> None:
        running = submit(url, 10_000)
        wait_for(lambda: status_of(url, running) == "running", "its start", LIMIT_S)
        interrupt(signal.SIGINT)
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503, "the first one", LIMIT_S)
        assert status_of(url, running) == "running"
        began.append(time.monotonic())
        interrupt(signal.SIGINT)

    assert run_server(tmp_path, Fleet(), act, "serve.max_steps=10000") == Status("cancelled", "interrupted")
    assert time.monotonic() - began[0] < LIMIT_S  # serve.drain_s is 30 s


def test_a_server_whose_ranks_have_failed_ends_if_it_is_to(tmp_path: Path) -> None:
    fleet = Fleet()

    def act(url: str) -> None:
        fleet.lives[0].death = "rank 0 died with SIGKILL"

    status = run_server(tmp_path, fleet, act, "serve.restarts=0", "serve.exit_when_failed=true")
    assert status.state == "failed"
    assert "serve.restarts=0" in (status.error or "")


def test_a_first_start_that_fails_ends_the_command_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(EngineGone, match="no such checkpoint"):
        run_server(tmp_path, Fleet(stillborn=(0,)), None)


def test_nobody_else_reads_what_a_server_writes(tmp_path: Path) -> None:
    def act(url: str) -> None:
        request_id = submit(url, 1)
        wait_for(lambda: status_of(url, request_id) == "done", "an image", LIMIT_S)
        interrupt(signal.SIGTERM)

    run_server(tmp_path, Fleet(), act)
    paths = [path for path in (tmp_path / "run").rglob("*") if path.name != ".owner"]
    assert {path.name: path.stat().st_mode & 0o077 for path in paths} == dict.fromkeys((p.name for p in paths), 0)
    assert {"requests.jsonl", "server.log", "config.yaml"} <= {path.name for path in paths}
    assert [path.suffix for path in (tmp_path / "run" / "samples").iterdir()] == [".png"]
