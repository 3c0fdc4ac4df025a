"""The HTTP server as others use it: OpenAI's own client, requests made from our OpenAPI document, and broken ones."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from harness.config.schema import RunConfig
from harness.resolve.compose import compose_run
from tests.fixtures.commands import wait_for
from tests.fixtures.serving.http_clients import keep_to_its_document, stream_images, use_images
from tests.fixtures.serving.http_server import Live, live
from tests.fixtures.serving.malformed_requests import MAKERS, Make, abuse, torn


@pytest.fixture(scope="module")
def config() -> RunConfig:
    short = ["serve.max_body_kib=32", "serve.head_timeout_s=0.5", "serve.body_timeout_s=0.5"]
    config = compose_run(["task=serve", "serve.port=0", *short]).config
    return replace(config, model=replace(config.model, max_frames=17, frame_multiple=4))


@pytest.fixture(scope="module")
def site(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(config, tmp_path_factory.mktemp("site")) as found:
        yield found


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_openais_client_generates_images_and_videos(site: Live) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key="none") as client:
        use_images(client)
        stream_images(client)
        with pytest.raises(openai.APIError, match="rank 1: planted") as broken:
            list(client.images.generate(prompt="oom", stream=True))
        assert broken.value.code == "oom"
        with pytest.raises(openai.BadRequestError, match="transparent") as refused:
            client.images.generate(prompt="x", background="transparent")
        assert refused.value.request_id == refused.value.body["request_id"]
        video = client.videos.create_and_poll(
            prompt="a fox", seconds="1", poll_interval_ms=20, extra_body={"triptych": {"steps": 2}}
        )
        assert (video.status, video.size) == ("completed", "64x64")
        assert client.videos.download_content(video.id).read()[4:8] == b"ftyp"
        assert video.id in [one.id for one in client.videos.list()]
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)
        with pytest.raises(openai.BadRequestError, match="64 or 72"):
            client.images.generate(prompt="x", size="65x64")
        sent = len(site.engine.jobs)
        with pytest.raises(openai.InternalServerError, match="rank 1: planted") as raised:
            client.images.generate(prompt="failed")
        assert raised.value.code == "failed"
        assert len(site.engine.jobs) == sent + 1  # the client did not send it again


@pytest.mark.slow
def test_requests_made_from_our_document_find_no_fault(site: Live) -> None:
    keep_to_its_document(site.url, examples=10)


def test_malformed_requests_are_the_clients_fault(site: Live) -> None:
    statuses = abuse(site.port, number=600, seed=1)
    assert max(statuses) < 500, statuses
    assert sum(statuses.values()) > 400
    assert len(statuses) >= 6, statuses
    assert httpx.get(f"{site.url}/ready").status_code == 200
    assert httpx.post(f"{site.url}/v1/images/generations", json={"prompt": "x"}).status_code == 200


@pytest.mark.parametrize("make", [make for make in MAKERS if make is not torn])
def test_each_kind_of_malformed_request_gets_answers(site: Live, make: Make) -> None:
    assert abuse(site.port, number=12, seed=2, makers=[make])


@pytest.mark.parametrize(
    ("range_", "status", "length"),
    [
        ("bytes=0-9", 206, 10),
        ("bytes=-5", 206, 5),
        ("bytes=99999999-", 416, None),
        ("bytes=" + "9" * 5_000 + "-", 200, None),
        ("bytes=0-1,3-4", 200, None),
        ("bytes=5-1", 400, None),
        ("items=0-1", 200, None),
        ("\xff", 200, None),
    ],
)
def test_ranges_of_an_image(site: Live, range_: str, status: int, length: int | None) -> None:
    body = {"prompt": "x", "response_format": "url", "triptych": {"steps": 1}}
    link = httpx.post(f"{site.url}/v1/images/generations", json=body).json()["data"][0]["url"]
    answer = httpx.get(link, headers={"range": range_.encode("latin-1")})
    assert answer.status_code == status
    assert length is None or len(answer.content) == length
    assert status < 400 or answer.json()["error"]["code"] in ("no_such_range", "rejected")


def test_a_stream_whose_client_goes_cancels_its_request(config: RunConfig, tmp_path: Path) -> None:
    with live(config, tmp_path, step_s=0.05) as site:
        body = {"prompt": "x", "stream": True, "partial_images": 3, "num_inference_steps": 200}
        with httpx.stream("POST", f"{site.url}/v1/images/generations", json=body) as answer:
            assert next(answer.iter_lines()).startswith("event: image_generation.partial_image")
        wait_for(lambda: site.engine._cancelled == set(site.engine.jobs), "the cancellation", 10)
