"""The HTTP server as others use it: OpenAI's own client, requests made from our OpenAPI document, and broken ones."""

from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from harness.config.schema import RunConfig
from harness.resolve.compose import compose_run
from tests.fixtures.serving.http_clients import keep_to_its_document, use_images
from tests.fixtures.serving.http_server import Live, live
from tests.fixtures.serving.malformed_requests import abuse


@pytest.fixture(scope="module")
def config() -> RunConfig:
    config = compose_run(["task=serve", "serve.port=0", "serve.max_body_kib=32"]).config
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
    statuses = abuse(site.port, number=150, seed=1)
    assert set(statuses) <= set(range(400, 500)), statuses
    assert sum(statuses.values()) > 60
    assert httpx.get(f"{site.url}/ready").status_code == 200
    assert httpx.post(f"{site.url}/v1/images/generations", json={"prompt": "x"}).status_code == 200
