"""The service between the routes and the supervisor: whatever the disk, the terminal or the clock does, it answers."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from harness.config.schema import RunConfig
from harness.messages import Progress
from harness.resolve.compose import compose_run
from harness.tasks.serve import service as module
from harness.tasks.serve.app import make_app
from harness.tasks.serve.jobs import GenerationJob
from harness.tasks.serve.service import GenerationService
from tests.fixtures.serving.fake_engine import make_request
from tests.fixtures.serving.fake_supervisor import FakeSupervisor

pytestmark = pytest.mark.anyio
IMAGES, REQUESTS = "/v1/images/generations", "/v1/requests"
BODY = {"prompt": "x", "triptych": {"steps": 1}}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose_run(["task=serve"]).config


@asynccontextmanager
async def site(config: RunConfig, folder: Path) -> AsyncIterator[tuple[httpx.AsyncClient, GenerationService]]:
    """Yield a client of an application over a fake supervisor, and its service."""
    app: Any = make_app(config, FakeSupervisor(config), folder)  # type: ignore[arg-type]
    wire = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=wire, base_url="http://127.0.0.1:8000", timeout=20) as client:
        yield client, app.state.service
    await app.state.service.close()


async def test_a_disk_that_takes_nothing_is_said_before_a_request_finds_it(config: RunConfig, tmp_path: Path) -> None:
    async with site(config, tmp_path) as (client, service):
        service.housekeeping.trouble = "the disk is full; free some disk space"
        for path in (IMAGES, REQUESTS):
            answer = await client.post(path, json=BODY)
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "not_saved")
            assert answer.json()["error"]["message"] == "the disk is full; free some disk space"
        ready = await client.get("/ready")
        assert (ready.status_code, ready.headers["retry-after"]) == (503, "1")
        assert "free some disk space" in ready.json()["error"]["message"]
        assert b"triptych_ready 0.0" in service.metrics.text()
        service.housekeeping.trouble = ""
        assert (await client.get("/ready")).status_code == 200
        assert (await client.post(IMAGES, json=BODY)).status_code == 200


async def test_images_that_are_not_kept_any_more_are_404_in_one_line(config: RunConfig, tmp_path: Path) -> None:
    async with site(config, tmp_path) as (client, service):
        answer = (await client.post(IMAGES, json=BODY | {"response_format": "url"})).json()
        url = answer["data"][0]["url"]
        assert (await client.get(url)).status_code == 200
        service.housekeeping._max_age_s = 0.0
        service.housekeeping.trim()
        gone = await client.get(url)
        assert gone.status_code == 404
        assert "\n" not in gone.json()["error"]["message"]
        assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("broken", ["print_error", "storage.append_entry", "log_entry"])
async def test_a_request_is_settled_whatever_fails_after_its_answer(
    config: RunConfig, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a terminal that was closed, under a disk that is full."""

    def fail(*arguments: object) -> None:
        raise OSError(5, "Input/output error") if broken != "log_entry" else TypeError("planted")

    monkeypatch.setattr(f"{module.__name__}.storage.append_entry", fail)
    monkeypatch.setattr(f"{module.__name__}.{broken}", fail)
    async with site(config, tmp_path) as (client, service):
        assert (await client.post(IMAGES, json=BODY)).status_code == 200
        counted = b'triptych_requests_total{outcome="ok"} 1.0' in service.metrics.text()
        assert counted == (broken != "log_entry")


async def test_the_client_of_a_request_goes_to_the_ranks(config: RunConfig, tmp_path: Path) -> None:
    async with site(config, tmp_path) as (_, service):
        handle = service.submit(make_request("a"), None, client="key:ann")
        await handle.settled.wait()
        assert handle.job.request.client == "key:ann"


async def test_a_step_of_the_wall_clock_changes_no_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    job = GenerationJob(make_request("a"))
    shown = job.arrived_at
    monkeypatch.setattr(time, "time", lambda: shown - 86_400.0)
    job.on_progress(Progress("a", "denoising", 1, 2))
    assert job.began is not None
    assert 0 <= job.began - job.arrived < 60
    assert job.began_at is not None
    assert 0 <= job.began_at - shown < 60
    assert 0 <= job.elapsed_s < 60
    job.queue_again()
    assert (job.state, job.began, job.began_at, job.done) == ("queued", None, None, 0)
