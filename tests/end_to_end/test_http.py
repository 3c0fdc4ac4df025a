"""The HTTP server's routes over a fake supervisor: what is generated, what is refused, what a client is told."""

import asyncio
import base64
import errno
import io
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
import pytest
from PIL import Image

from harness.cli import run_one
from harness.config.schema import RunConfig
from harness.engines.pool import new_engine
from harness.records.media import ffmpeg
from harness.resolve.compose import ConfigError, ResolvedRun, compose_run
from harness.tasks.serve import storage
from harness.tasks.serve.access import KEY_VARIABLE
from harness.tasks.serve.app import make_app
from harness.tasks.serve.image_files import ImageEncoding
from harness.tasks.serve.multipart import form_to_json, multipart_boundary
from harness.tasks.serve.problem import STATUS, Problem
from harness.tasks.serve.service import GenerationService
from tests.fixtures.serving.fake_supervisor import FakeSupervisor

IMAGES, VIDEOS, REQUESTS = "/v1/images/generations", "/v1/videos", "/v1/requests"
JSON = {"content-type": "application/json"}
LIMIT_S = 20
WITHIN_S = 3.0


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose_run(["task=serve", "serve.max_queue=2", "serve.max_body_kib=32"]).config


@pytest.fixture(scope="module")
def app(config: RunConfig) -> Any:
    return make_app(config, FakeSupervisor(config), Path())  # type: ignore[arg-type]


@dataclass
class Site:
    client: httpx.AsyncClient
    engine: FakeSupervisor
    app: Any


@asynccontextmanager
async def site(app: Any, config: RunConfig, folder: Path, step_s: float) -> AsyncIterator[Site]:
    """Return an application with its own service."""
    engine = FakeSupervisor(config, step_s)
    app.state.service = GenerationService(config, engine, folder)  # type: ignore[arg-type]
    wire = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=wire, base_url="http://127.0.0.1:8000", timeout=LIMIT_S) as client:
        yield Site(client, engine, app)
    await app.state.service.close()


class Talk(Protocol):
    """Sends requests to a server and reads the lines of its requests.jsonl."""

    def __call__(
        self, talk: Callable[[Site], Awaitable[None]], step_s: float = 0.0, config: RunConfig | None = None
    ) -> list[dict[str, Any]]: ...


@pytest.fixture
def run(app: Any, config: RunConfig, tmp_path: Path) -> Talk:
    own = config

    def run(
        talk: Callable[[Site], Awaitable[None]], step_s: float = 0.0, config: RunConfig | None = None
    ) -> list[dict[str, Any]]:
        async def whole() -> None:
            async with asyncio.timeout(LIMIT_S), site(app, config or own, tmp_path, step_s) as at:
                await talk(at)

        asyncio.run(whole())
        lines = tmp_path / storage.REQUESTS_FILE
        return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []

    return run


def error(answer: httpx.Response, status: int, code: str) -> str:
    """Return the message of an error that has OpenAI's shape."""
    assert answer.status_code == status, answer.text
    reason = answer.json()["error"]
    assert set(reason) == {"message", "type", "param", "code", "request_id"}
    assert reason["request_id"] == answer.headers["x-request-id"]
    assert reason["code"] == code
    assert reason["message"]
    assert "\n" not in reason["message"]
    line: str = reason["message"]
    return line


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


async def until(client: httpx.AsyncClient, request_id: str, *states: str) -> dict[str, Any]:
    while True:
        found: dict[str, Any] = (await client.get(f"{REQUESTS}/{request_id}")).json()
        if found["status"] in states:
            return found
        await asyncio.sleep(0.01)


def test_images_come_in_the_requested_format(run: Talk, tmp_path: Path) -> None:
    settings = {"steps": 3, "seed": 5, "guidance": 1.5, "negative_prompt": "blue", "timeout_s": 9}
    body = {"prompt": "red apple", "n": 2, "size": "32x16", "user": "ann", "model": "emoji", "triptych": settings}

    async def talk(at: Site) -> None:
        answer = (await at.client.post(IMAGES, json=body)).json()
        images = [opened(base64.b64decode(image["b64_json"])) for image in answer["data"]]
        assert [np.asarray(image).max() for image in images] == [0, 26]  # the order in which the engine answers
        assert {image.size for image in images} == {(32, 16)}
        assert images[1].text["seed"] == "6"  # type: ignore[attr-defined]
        assert answer["size"] == "32x16"
        assert answer["triptych"]["seed"] == 5
        (sent,) = at.engine.generated
        assert sent.prompts == ["red apple"]
        assert (sent.samples_per_prompt, sent.batch_size) == (2, 2)  # its images share forwards
        assert (sent.steps, sent.seed, sent.guidance, sent.negative_prompt, sent.timeout_s) == (3, 5, 1.5, "blue", 9)

    (line,) = run(talk)
    assert (line["outcome"], line["user"], len(line["samples"])) == ("ok", "ann", 2)
    assert all((tmp_path / sample["path"]).is_file() for sample in line["samples"])


def test_links_lead_to_the_same_images_and_seeds_are_random(run: Talk) -> None:
    async def talk(at: Site) -> None:
        answers = [(await at.client.post(IMAGES, json={"prompt": "x", "response_format": "url"})).json() for _ in "ab"]
        assert answers[0]["triptych"]["seed"] != answers[1]["triptych"]["seed"]
        image = await at.client.get(answers[0]["data"][0]["url"])
        assert image.headers["content-type"] == "image/png"
        name = f"x-seed{answers[0]['triptych']['seed']}-steps20.png"
        assert image.headers["content-disposition"] == f'inline; filename="{name}"'
        assert opened(image.content).size == (64, 64)
        assert (await at.client.get(answers[0]["data"][0]["url"][:-1] + "1")).status_code == 404

    run(talk)


@pytest.mark.parametrize(
    ("path", "body", "code", "words"),
    [
        (IMAGES, {}, "rejected", "prompt: Field required"),
        (IMAGES, [], "rejected", "JSON object"),
        (IMAGES, {"prompt": "x", "promt": "y"}, "rejected", "promt: there is no such field"),
        (IMAGES, {"prompt": "x" * 8001}, "rejected", "shorten it to 8000"),
        (IMAGES, {"prompt": "x", "n": 9}, "rejected", "n=9; this server takes 1 to 8"),
        (IMAGES, {"prompt": "x", "n": 0}, "rejected", "n=0; this server takes 1 to 8"),
        (IMAGES, {"prompt": "x", "size": "65x64"}, "rejected", "64 or 72"),
        (IMAGES, {"prompt": "x", "size": "large"}, "rejected", "such as 64x64"),
        (IMAGES, {"prompt": "x", "size": "4096x4096"}, "rejected", "may be at most 262144"),
        (IMAGES, {"prompt": "x", "model": "dall-e-3"}, "model_not_found", "use model=emoji"),
        (IMAGES, {"prompt": "x", "quality": "best"}, "rejected", "quality"),
        (IMAGES, {"prompt": "x", "stream": "often"}, "rejected", "stream"),
        (IMAGES, {"prompt": "x", "triptych": {"steps": 251}}, "rejected", "steps=251; this server takes 1 to 250"),
        (IMAGES, {"prompt": "x", "triptych": {"seed": -1}}, "rejected", "seed=-1; this server takes 0 to"),
        (IMAGES, {"prompt": "x", "triptych": {"guidance": -1}}, "rejected", "guidance=-1.0"),
        (
            IMAGES,
            {"prompt": "x", "triptych": {"timeout_s": 601}},
            "rejected",
            "timeout_s=601.0; this server takes more than 0 and at most 600",
        ),
        (IMAGES, {"prompt": "x", "triptych": {"timeout_s": 0}}, "rejected", "more than 0"),
        (IMAGES, {"prompt": "x", "triptych": {"scheduler": "ddpm"}}, "rejected", "noise scheduler is rectified_flow"),
        (IMAGES, {"prompt": "x", "triptych": {"frames": 5}}, "rejected", "post to /v1/videos"),
        (REQUESTS, {"prompt": "x", "triptych": {"frames": 5}}, "rejected", "this model makes images"),
        (VIDEOS, {"prompt": "x"}, "rejected", "post to /v1/images/generations"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_the_engine_gets_it(
    run: Talk, path: str, body: object, code: str, words: str
) -> None:
    async def talk(at: Site) -> None:
        answer = await at.client.post(path, json=body)
        assert words in error(answer, STATUS[code], code)
        assert answer.headers["x-should-retry"] == "false"
        assert at.engine.jobs == {}

    run(talk)


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b'{"prompt": ', JSON, 400, "rejected"),
        (b'{"prompt": "\\ud800"}', JSON, 400, "rejected"),
        (b'{"prompt": "x", "\\ud800": 1}', JSON, 400, "rejected"),
        (b'{"prompt": "x", "n": 1' + b"0" * 5000 + b"}", JSON, 400, "rejected"),
        (b'{"prompt": "x", "triptych": {"guidance": NaN}}', JSON, 400, "rejected"),
        (b"[" * 30_000, JSON, 400, "rejected"),
        (b"\xff\xfe", JSON, 400, "rejected"),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}, 400, "rejected"),
        (b"x" * 40_000, JSON, 413, "too_large"),
        (b"", {"content-type": "multipart/form-data"}, 400, "rejected"),
        (b"--b\r\n\r\nx\r\n--b--", {"content-type": "multipart/form-data; boundary=b"}, 400, "rejected"),
    ],
)
def test_bodies_that_are_none(run: Talk, content: bytes, headers: dict[str, str], status: int, code: str) -> None:
    async def talk(at: Site) -> None:
        error(await at.client.post(IMAGES, content=content, headers=headers), status, code)
        assert at.engine.jobs == {}

    run(talk)


def test_a_body_without_a_length_is_bounded_too(run: Talk) -> None:
    sent = 0

    async def long() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1000
            yield b"x" * 1000

    async def talk(at: Site) -> None:
        error(await at.client.post(IMAGES, content=long(), headers=JSON), 413, "too_large")
        assert sent <= 34_000

    run(talk)


def test_a_body_that_states_too_much_is_refused_unread(run: Talk) -> None:
    async def unread() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    async def talk(at: Site) -> None:
        headers = JSON | {"content-length": str(10**9)}
        error(await at.client.post(IMAGES, content=unread(), headers=headers), 413, "too_large")

    run(talk)


@pytest.mark.parametrize(
    ("kind", "status", "retry_after"),
    [
        ("rejected", 400, None),
        ("unsupported", 400, None),
        ("expired", 408, None),
        ("busy", 429, "1"),
        ("failed", 503, None),
        ("oom", 507, None),
    ],
)
def test_a_failure_of_the_engine_is_an_answer_of_its_kind(
    run: Talk, kind: str, status: int, retry_after: str | None
) -> None:
    async def talk(at: Site) -> None:
        answer = await at.client.post(IMAGES, json={"prompt": kind})
        assert error(answer, status, kind) == "rank 1: planted"
        assert answer.headers.get("retry-after") == retry_after
        assert answer.headers["x-should-retry"] == str(kind == "busy").lower()
        assert f'triptych_requests_total{{outcome="{kind}"}} 1.0' in (await at.client.get("/metrics")).text

    (line,) = run(talk)
    assert (line["outcome"], line["error"]) == (kind, "rank 1: planted")


def test_a_full_queue_and_a_server_that_has_stopped_say_when_to_come_again(run: Talk) -> None:
    async def talk(at: Site) -> None:
        generated = (await at.client.post(REQUESTS, json={"prompt": "x"})).json()["id"]
        await until(at.client, generated, "running")
        waiting = [(await at.client.post(REQUESTS, json={"prompt": "x"})).json()["id"] for _ in range(2)]
        answer = await at.client.post(IMAGES, json={"prompt": "x"})
        error(answer, 429, "busy")
        assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("3", "true")
        for request_id in (generated, *waiting):
            await at.client.delete(f"{REQUESTS}/{request_id}")
            await until(at.client, request_id, "failed")
        at.engine.state, at.engine.reason = "failed", "rank 1 died with SIGKILL"
        answer = await at.client.post(IMAGES, json={"prompt": "x"})
        assert error(answer, 503, "not_serving") == "rank 1 died with SIGKILL"
        assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("60", "true")

    run(talk, step_s=0.1)


def test_health_is_honest(run: Talk) -> None:
    async def talk(at: Site) -> None:
        assert (await at.client.get("/ready")).status_code == 200
        at.engine.state, at.engine.reason, at.engine.info = "restarting", "rank 1 died with SIGKILL", None
        answer = await at.client.get("/ready")
        assert error(answer, 503, "not_serving") == "restarting: rank 1 died with SIGKILL"
        health = await at.client.get("/health")
        assert health.status_code == 200
        assert (health.json()["state"], health.json()["ranks"]) == ("restarting", 0)
        assert "triptych_ready 0.0" in (await at.client.get("/metrics")).text
        for state in ("failed", "stopping"):
            at.engine.state = state
            assert state in error(await at.client.get("/health"), 503, "not_serving")

    run(talk)


def test_a_client_that_goes_away_cancels_its_request(run: Talk) -> None:
    async def talk(at: Site) -> None:
        asking = asyncio.create_task(hang_up(at.app, {"prompt": "x"}, after_s=0.2))
        await asyncio.wait_for(asking, WITHIN_S)
        (job,) = at.engine.jobs.values()
        await asyncio.wait_for(job.wait(), WITHIN_S)
        assert job.failure is not None
        assert job.failure.kind == "cancelled"

    (line,) = run(talk, step_s=1.0)
    assert line["outcome"] == "cancelled"


async def hang_up(app: Any, body: object, after_s: float) -> None:
    """Post, then close the connection before there is an answer."""
    said = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if said:
            return said.pop()
        await asyncio.sleep(after_s)
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        pass

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": IMAGES, "raw_path": IMAGES.encode(), "query_string": b""}
    await app(scope | {"headers": headers, "scheme": "http", "server": ("localhost", 80)}, receive, send)


def test_requests_are_cancelled_where_they_are(run: Talk) -> None:
    async def talk(at: Site) -> None:
        first, second = [(await at.client.post(REQUESTS, json={"prompt": "x"})).json() for _ in range(2)]
        assert (second["status"], second["total"]) == ("queued", 20)
        await until(at.client, first["id"], "running")
        assert [r["id"] for r in (await at.client.get(REQUESTS)).json()["data"]] == [second["id"], first["id"]]
        waiting = asyncio.create_task(at.client.get(f"{REQUESTS}/{second['id']}/content/0"))
        error(await waiting, 409, "not_done")
        for request in (first, second):
            assert (await at.client.delete(f"{REQUESTS}/{request['id']}")).status_code == 202
            ended = await until(at.client, request["id"], "failed")
            assert ended["error"]["code"] == "cancelled"
            error(await at.client.get(f"{REQUESTS}/{request['id']}/content/0"), 409, "cancelled")

    run(talk, step_s=0.05)


def test_progress_streams_until_the_image_is_there(run: Talk) -> None:
    settings = {"steps": 4, "negative_prompt": "blue"}

    async def talk(at: Site) -> None:
        requested = (await at.client.post(REQUESTS, json={"prompt": "x", "triptych": settings})).json()
        stream = await at.client.get(f"{REQUESTS}/{requested['id']}/events")
        assert stream.headers["content-type"].startswith("text/event-stream")
        reason = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: ")]
        assert [one["done"] for one in reason] == sorted(one["done"] for one in reason)
        assert {one["done"] for one in reason} >= {1, 2, 3}
        elapsed = [one["elapsed_s"] for one in reason]
        assert elapsed == sorted(elapsed)
        assert elapsed[-1] == pytest.approx(reason[-1]["completed_at"] - reason[-1]["created_at"], abs=1e-3)
        assert {one["negative_prompt"] for one in reason} == {"blue"}
        assert reason[-1]["stage"] == "saving"
        assert (reason[-1]["status"], len(reason[-1]["urls"])) == ("done", 1)
        assert all(one["urls"] == [] for one in reason[:-1])

    run(talk, step_s=0.02)


def as_form(fields: dict[str, str]) -> tuple[bytes, dict[str, str]]:
    parts = (f'--b\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items())
    return "".join([*parts, "--b--\r\n"]).encode(), {"content-type": "multipart/form-data; boundary=b"}


def test_a_video_is_a_job(run: Talk, config: RunConfig, tmp_path: Path) -> None:
    ffmpeg()
    videos = replace(config, model=replace(config.model, max_frames=17, frame_multiple=4, fps=8))

    async def talk(at: Site) -> None:
        body, headers = as_form({"prompt": "a fox", "seconds": "1", "triptych[steps]": "3"})
        made = (await at.client.post(VIDEOS, content=body, headers=headers)).json()
        assert (made["object"], made["status"], made["seconds"]) == ("video", "queued", "1.125")
        await until(at.client, made["id"], "done")
        found = (await at.client.get(f"{VIDEOS}/{made['id']}")).json()
        assert (found["status"], found["progress"], found["error"]) == ("completed", 100, None)
        video = await at.client.get(f"{VIDEOS}/{made['id']}/content")
        assert video.headers["content-type"] == "video/mp4"
        assert video.content[4:8] == b"ftyp"
        assert (at.engine.generated[0].frames, at.engine.generated[0].steps) == (9, 3)
        assert [one["id"] for one in (await at.client.get(VIDEOS)).json()["data"]] == [made["id"]]
        assert (await at.client.delete(f"{VIDEOS}/{made['id']}")).json()["deleted"] is True
        error(await at.client.get(f"{VIDEOS}/{made['id']}"), 404, "not_found")
        for body_, words in (
            ({"seconds": 3}, "at most 2.125"),
            ({"triptych": {"frames": 6}}, "the nearest is 5"),
            ({"seconds": 1, "triptych": {"frames": 5}}, "not both"),
            ({}, "is an image"),
        ):
            assert words in error(await at.client.post(VIDEOS, json={"prompt": "x", **body_}), 400, "rejected")
        image = (await at.client.post(REQUESTS, json={"prompt": "x", "triptych": {"frames": 1}})).json()
        error(await at.client.get(f"{VIDEOS}/{image['id']}"), 404, "not_found")

    run(talk, config=videos)
    assert list((tmp_path / "samples").glob("*.mp4")) == []


def test_a_form_is_the_object_that_it_stands_for() -> None:
    body, headers = as_form({"prompt": 'Ä "fox"\r\n--', "triptych[seed]": "3", "triptych[steps]": "4"})
    boundary = multipart_boundary(headers["content-type"])
    assert boundary == b"b"
    assert json.loads(form_to_json(body, boundary)) == {
        "prompt": 'Ä "fox"\r\n--',
        "triptych": {"seed": "3", "steps": "4"},
    }
    assert multipart_boundary("application/json") is None
    file = b'--b\r\nContent-Disposition: form-data; name="input_reference"; filename="a.png"\r\n\r\nx\r\n--b--'
    with pytest.raises(Problem, match="files are not read"):
        form_to_json(file, b"b")


@pytest.mark.parametrize(
    ("raised", "status", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 507, "not_saved", "No space left on device"),
        (RuntimeError("planted"), 500, "internal", "RuntimeError"),
    ],
)
def test_what_cannot_be_saved_is_an_answer_too(
    run: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, status: int, code: str, words: str
) -> None:
    whole = storage.save_image

    def fail_at_the_second(path: Path, image: Any, text: dict[str, str], encoding: ImageEncoding) -> None:
        if path.name.endswith("-01.png"):
            path.write_bytes(b"half")
            raise raised
        whole(path, image, text, encoding)

    async def talk(at: Site) -> None:
        monkeypatch.setattr(storage, "save_image", fail_at_the_second)
        answer = await at.client.post(IMAGES, json={"prompt": "x", "n": 2})
        assert words in error(answer, status, code)
        assert list((tmp_path / "samples").iterdir()) == []
        monkeypatch.setattr(storage, "save_image", whole)
        assert (await at.client.post(IMAGES, json={"prompt": "x", "n": 2})).status_code == 200

    lines = run(talk)
    assert [line["outcome"] for line in lines] == [code, "ok"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example"}, 403),
        ({"host": "evil.example"}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
    ],
)
def test_pages_of_other_sites_are_kept_out(run: Talk, headers: dict[str, str], status: int) -> None:
    async def talk(at: Site) -> None:
        assert (await at.client.post(IMAGES, json={"prompt": "x"}, headers=headers)).status_code == status

    run(talk)


def test_what_is_no_longer_kept_is_gone(run: Talk) -> None:
    async def talk(at: Site) -> None:
        first = (await at.client.post(IMAGES, json={"prompt": "x"})).json()["triptych"]["request_id"]
        assert [one["id"] for one in (await at.client.get(REQUESTS)).json()["data"]] == [first]
        assert (await at.client.get(REQUESTS, params={"limit": 0})).json()["data"] == []
        del at.engine.jobs[first]
        await at.client.post(IMAGES, json={"prompt": "x"})
        error(await at.client.get(f"{REQUESTS}/{first}"), 404, "not_found")

    run(talk)


def test_the_page_needs_nothing_from_elsewhere(run: Talk) -> None:
    async def talk(at: Site) -> None:
        for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
            answer = await at.client.get(path)
            assert answer.headers["content-type"].startswith(kind)
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert "unsafe" not in answer.headers["content-security-policy"]
            assert "://" not in answer.text

    run(talk)


def test_what_cannot_be_served_is_refused_before_a_folder_is_claimed(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "of-a-test")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for serve, words in (
            (replace(config.serve, port=port), f"serve.port={port} on 127.0.0.1 cannot be used"),
            (replace(config.serve, host="no.such.invalid"), "serve.host=no.such.invalid is not an address"),
        ):
            with pytest.raises(ConfigError, match=words):
                run_one(ResolvedRun(replace(config, serve=serve), [], tmp_path / "run", []), new_engine)
    with pytest.raises(ConfigError, match=r"use launch\.mode=torchrun"):
        compose_run(["task=serve", "launch.mode=inprocess", f"hydra.run.dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()
