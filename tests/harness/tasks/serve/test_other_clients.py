"""What other people's clients send: SGLang's and vllm-omni's names, formats, qualities, and streams of images."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from harness.config.schema import RunConfig
from harness.resolve.compose import compose_run
from harness.tasks.serve import parse
from harness.tasks.serve.app import make_app
from harness.tasks.serve.image_files import ImageEncoding
from tests.fixtures.serving.fake_supervisor import PREVIEW, FakeSupervisor

pytestmark = pytest.mark.anyio
IMAGES, REQUESTS, VIDEOS = "/v1/images/generations", "/v1/requests", "/v1/videos"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose_run(["task=serve"]).config


@asynccontextmanager
async def site(config: RunConfig, folder: Path) -> AsyncIterator[tuple[httpx.AsyncClient, FakeSupervisor]]:
    """Yield a client of an application over a fake supervisor, and that supervisor."""
    engine = FakeSupervisor(config)
    app: Any = make_app(config, engine, folder)  # type: ignore[arg-type]
    wire = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=wire, base_url="http://127.0.0.1:8000", timeout=20) as client:
        yield client, engine
    await app.state.service.close()


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the server-sent events of a stream: name and data."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines.get("event", ""), json.loads(lines["data"])))
    return found


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


async def test_the_bodies_of_sglangs_and_vllm_omnis_load_generators_are_taken_as_they_are(
    config: RunConfig, tmp_path: Path
) -> None:
    common = {"model": "default", "prompt": "rocket", "n": 1, "response_format": "b64_json", "size": "64x32"}
    extra = {"num_inference_steps": 3, "guidance_scale": 2.5, "seed": 11, "negative_prompt": "grey"}
    async with site(config, tmp_path) as (client, engine):
        for body in (common | extra, common | extra | {"true_cfg_scale": 2.5}, common):
            assert (await client.post(IMAGES, json=body)).status_code == 200
        first, second, third = engine.generated
    for request in (first, second):
        assert (request.steps, request.guidance, request.seed, request.negative_prompt) == (3, 2.5, 11, "grey")
        assert (request.width, request.height) == (64, 32)
    assert (third.steps, third.guidance) == (20, 3.0)


async def test_videos_take_their_names_in_forms_and_in_json(config: RunConfig, tmp_path: Path) -> None:
    videos = replace(config, model=replace(config.model, max_frames=17, frame_multiple=4))
    body = {"prompt": "fox", "num_frames": 5, "fps": videos.model.fps, "num_inference_steps": 2, "seed": 3}
    async with site(videos, tmp_path) as (client, engine):
        form = {name: (None, str(value)) for name, value in (body | {"width": 32, "height": 64}).items()}
        for sent in ({"files": form}, {"json": body | {"size": "32x64"}}):
            assert (await client.post(VIDEOS, **sent)).status_code == 200  # type: ignore[arg-type]
            request = list(engine.jobs.values())[-1].request
            assert (request.frames, request.steps, request.seed) == (5, 2, 3)
            assert (request.width, request.height) == (32, 64)
        for wrong, line in (
            ({"fps": 999}, f"fps=999; this server takes {videos.model.fps}"),
            ({"width": 32}, "give width and height, or size=WIDTHxHEIGHT"),
            ({"width": 32, "height": 32, "size": "64x64"}, "size=64x64 and width x height = 32x32 differ; give one"),
        ):
            answer = await client.post(VIDEOS, json=body | wrong)
            assert answer.status_code == 400
            assert line in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param", "line"),
    [
        ({"seed": 1, "triptych": {"seed": 2}}, "seed", "seed=1 and triptych.seed=2 are two values of one thing"),
        ({"guidance_scale": 1.5, "true_cfg_scale": 4}, "true_cfg_scale", "true_cfg_scale=4.0 and guidance_scale=1.5"),
        ({"num_inference_steps": 251}, "num_inference_steps", "num_inference_steps=251; this server takes 1 to 250"),
        ({"negative_prompt": "a", "triptych": {"negative_prompt": "b"}}, "negative_prompt", "negative_prompt=a and"),
        (
            {"quality": "low", "num_inference_steps": 8},
            "quality",
            "quality=low means 10 steps, and num_inference_steps",
        ),
        ({"background": "transparent"}, "background", "no model here makes transparent images; use opaque"),
        ({"output_compression": 50}, "output_compression", "output_compression is for jpeg and webp"),
        ({"output_format": "webp", "output_compression": 101}, "output_compression", "takes 0 to 100"),
        ({"partial_images": 2}, "partial_images", "partial_images come in a stream; add stream=true"),
        ({"stream": True, "partial_images": 4}, "partial_images", "partial_images=4; this server takes 0 to 3"),
        ({"stream": True, "response_format": "url"}, "response_format", "a stream has images in base64"),
        ({"quality": "xhigh"}, "quality", "quality"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"stream": True, "partial_images": 1, "triptych": {"previews": 2}}, "partial_images", "two values of one"),
    ],
)
async def test_what_contradicts_itself_is_refused_in_one_line(
    config: RunConfig, tmp_path: Path, body: dict[str, Any], param: str, line: str
) -> None:
    async with site(config, tmp_path) as (client, engine):
        answer = await client.post(IMAGES, json={"prompt": "x"} | body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert line in error["message"]
        assert "\n" not in error["message"]
        assert str(error["param"]).startswith(param)
        assert not engine.jobs


async def test_a_network_that_takes_the_scale_as_an_input_has_no_true_cfg(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Embedded:
        def __init__(self, config: RunConfig) -> None:
            self.shape = type("Shape", (), {"embedded": True})

    monkeypatch.setattr(parse, "ResolvedRun", Embedded)
    async with site(config, tmp_path) as (client, engine):
        answer = await client.post(IMAGES, json={"prompt": "x", "true_cfg_scale": 4.0})
        assert answer.json()["error"]["message"].startswith("true_cfg_scale=4, but emoji takes the scale as an input")
        body = {"prompt": "x", "true_cfg_scale": 1.0, "guidance_scale": 3.5}
        assert (await client.post(IMAGES, json=body)).status_code == 200
        assert engine.generated[0].guidance == 3.5


@pytest.mark.parametrize(
    ("quality", "steps", "said"),
    [
        ("low", 10, "low"),
        ("medium", 20, "medium"),
        ("high", 40, "high"),
        ("hd", 40, "high"),
        ("auto", 20, None),
        ("standard", 20, None),
    ],
)
async def test_quality_is_a_number_of_steps_and_is_said(
    config: RunConfig, tmp_path: Path, quality: str, steps: int, said: str | None
) -> None:
    async with site(config, tmp_path) as (client, engine):
        answer = (await client.post(IMAGES, json={"prompt": "x", "quality": quality})).json()
    assert engine.generated[0].steps == answer["triptych"]["steps"] == steps
    assert (answer["quality"], answer["background"], answer["output_format"]) == (said, "opaque", "png")


@pytest.mark.parametrize(("name", "media_type"), [("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "image/webp")])
async def test_images_have_the_format_that_is_asked_for(
    config: RunConfig, tmp_path: Path, name: str, media_type: str
) -> None:
    body = {"prompt": "a \u2708", "output_format": name, "seed": 5}
    async with site(config, tmp_path) as (client, _):
        answer = (await client.post(IMAGES, json=body)).json()
        image = opened(answer["data"][0]["b64_json"])
        assert (image.format, image.size) == (name.upper(), (64, 64))
        linked = (await client.post(IMAGES, json=body | {"response_format": "url"})).json()
        file = await client.get(linked["data"][0]["url"])
        assert file.headers["content-type"] == media_type
        assert Image.open(io.BytesIO(file.content)).format == name.upper()
    text = str(getattr(image, "text", "")) + image.getexif().get(0x010E, "")
    said = text if name == "png" else text.encode("latin-1").decode()
    assert "a \u2708" in said
    assert "seed" in said


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_compression_is_the_quality_of_the_file(name: Any) -> None:
    import numpy as np

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sizes = [len(ImageEncoding(name, quality).encode(noise, {})) for quality in (0, 50, 100)]
    assert sizes[0] < sizes[1] < sizes[2]
    assert len(ImageEncoding("png").encode(noise, {})) > sizes[1]


async def test_a_stream_has_the_partial_images_and_then_every_image(config: RunConfig, tmp_path: Path) -> None:
    body = {"prompt": "x", "n": 2, "stream": True, "partial_images": 3, "output_format": "jpeg", "seed": 4}
    async with site(config, tmp_path) as (client, engine):
        answer = await client.post(IMAGES, json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = events(answer.text)
        assert engine.generated[0].previews == 3
    names = [name for name, _ in found]
    partial, complete = "image_generation.partial_image", "image_generation.completed"
    assert names == [partial] * 3 + [complete] * 2
    assert [data["partial_image_index"] for _, data in found[:3]] == [0, 1, 2]
    for name, data in found:
        assert data["type"] == name
        assert opened(data["b64_json"]).format == "JPEG"
        assert (data["output_format"], data["size"], data["background"]) == ("jpeg", "64x64", "opaque")
        assert data["quality"] == "auto"
    assert opened(found[0][1]["b64_json"]).size == (8, 8)
    assert opened(found[3][1]["b64_json"]).size == (64, 64)
    assert found[3][1]["triptych"]["seed"] == 4


async def test_a_stream_that_fails_ends_with_an_error(config: RunConfig, tmp_path: Path) -> None:
    async with site(config, tmp_path) as (client, _):
        found = events((await client.post(IMAGES, json={"prompt": "oom", "stream": True})).text)
    assert [name for name, _ in found] == ["error"]
    assert found[0][1]["error"]["code"] == "oom"


async def test_the_events_of_a_request_have_each_preview_once(config: RunConfig, tmp_path: Path) -> None:
    preview = base64.b64encode(PREVIEW).decode()
    async with site(config, tmp_path) as (client, engine):
        engine.step_s = 0.01
        body = {"prompt": "x", "triptych": {"steps": 6, "previews": 2}}
        request = (await client.post(REQUESTS, json=body)).json()
        found = events((await client.get(f"{REQUESTS}/{request['id']}/events")).text)
        shown = [data["preview"] for _, data in found]
        assert shown.count(preview) == 2
        assert set(shown) == {preview, None}
        assert found[-1][1]["preview"] is None
        listed = (await client.get(REQUESTS)).json()["data"]
        assert [one["preview"] for one in listed] == [None]
        plain = (await client.post(REQUESTS, json={"prompt": "x"})).json()
        assert plain["preview"] is None
        await client.post(REQUESTS, json={"prompt": "x", "triptych": {"previews": True}})
        assert [job.request.previews for job in engine.jobs.values()] == [2, 0, 4]


@pytest.mark.parametrize("given", ["abc-1", "a/b+c=", "x" * 128, "x" * 129, "a b", "\u00e4", ""])
async def test_every_answer_has_the_request_id_of_the_client_or_a_new_one(
    config: RunConfig, tmp_path: Path, given: str
) -> None:
    legal = given in ("abc-1", "a/b+c=", "x" * 128)
    body = {"prompt": "x", "num_inference_steps": 1}
    async with site(config, tmp_path) as (client, _):
        headers = {"x-request-id": given.encode()}
        answers = [
            await client.post(IMAGES, json=body, headers=headers),  # type: ignore[arg-type]
            await client.post(IMAGES, json={}, headers=headers),  # type: ignore[arg-type]
            await client.get("/nowhere", headers=headers),  # type: ignore[arg-type]
            await client.get("/health", headers={"host": "evil.example", **headers}),  # type: ignore[dict-item]
        ]
    found = [answer.headers["x-request-id"] for answer in answers]
    assert [answer.status_code for answer in answers] == [200, 400, 404, 403]
    assert found == [given] * 4 if legal else len({*found, given}) == 5
    for answer in answers[1:]:
        assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]
    (entry,) = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert entry["http_id"] == found[0]


async def test_the_page_of_routes_names_every_route_and_field_and_loads_nothing(
    config: RunConfig, tmp_path: Path
) -> None:
    async with site(config, tmp_path) as (client, _):
        page = await client.get("/docs")
        document = (await client.get("/openapi.json")).json()
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"<code>{method.upper()} {path}</code>" in page.text
    for name, schema in document["components"]["schemas"].items():
        assert f'id="{name}"' in page.text
        assert all(f"<code>{field}</code>" in page.text for field in schema["properties"])
    assert "integer (minimum 1, maximum 250)" in page.text
    assert "half of the server&#x27;s own" in page.text
    for forbidden in ("<script", "style=", "http://", "https://", "@import"):
        assert forbidden not in page.text


async def test_a_request_may_name_a_solver(config: RunConfig, tmp_path: Path) -> None:
    async with site(config, tmp_path) as (client, engine):
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert {"euler", "heun"} <= set(model["triptych"]["solvers"])
        answer = (await client.post(IMAGES, json={"prompt": "x", "triptych": {"solver": "heun"}})).json()
        assert (answer["triptych"]["solver"], engine.generated[0].solver) == ("heun", "heun")
        plain = (await client.post(IMAGES, json={"prompt": "x"})).json()
        assert (plain["triptych"]["solver"], engine.generated[1].solver) == ("euler", "")
        for solver, line in (("huen", "did you mean 'heun'"), ("edm_churn", "use another solver")):
            refused = await client.post(IMAGES, json={"prompt": "x", "triptych": {"solver": solver}})
            assert refused.status_code == 400
            error = refused.json()["error"]
            assert error["param"] == "triptych.solver"
            assert line.partition("use ")[2] in error["message"]
