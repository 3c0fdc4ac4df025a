"""The HTTP server as others use it: OpenAI's own client, requests made from our OpenAPI document, and broken ones."""

import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from PIL import Image

from harness.config.schema import RunConfig
from harness.resolve.compose import compose_run
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


def use_images(client: Any) -> None:
    """What a user of OpenAI's client does for pictures."""
    assert [model.id for model in client.models.list()] == ["emoji"]
    answer = client.images.generate(
        prompt="red apple", model="emoji", n=2, size="64x64", extra_body={"triptych": {"steps": 2, "seed": 7}}
    )
    pictures = [Image.open(io.BytesIO(base64.b64decode(picture.b64_json))) for picture in answer.data]
    assert [picture.size for picture in pictures] == [(64, 64), (64, 64)]
    assert [picture.text["seed"] for picture in pictures] == ["7", "8"]  # type: ignore[attr-defined]
    linked = client.images.generate(prompt="red apple", response_format="url", extra_body={"triptych": {"steps": 2}})
    assert httpx.get(linked.data[0].url).headers["content-type"] == "image/png"


def keep_to_its_document(url: str, examples: int) -> None:
    """Requests that the document allows, and bodies that it does not: no 5xx, and only answers that it states."""
    schemathesis, hypothesis = pytest.importorskip("schemathesis"), pytest.importorskip("hypothesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    checks = [not_a_server_error, response_schema_conformance, status_code_conformance]
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) >= 15
    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    right, wrong = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    for operation in operations:
        for mode in (right, wrong) if operation.body else (right,):

            @settings
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def holds(case: Any) -> None:
                case.call_and_validate(checks=checks, timeout=60)

            holds()


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_openais_client_draws_pictures_and_videos(site: Live) -> None:
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
    told = abuse(site.port, number=150, seed=1)
    assert set(told) <= set(range(400, 500)), told
    assert sum(told.values()) > 60
    assert httpx.get(f"{site.url}/ready").status_code == 200
    assert httpx.post(f"{site.url}/v1/images/generations", json={"prompt": "x"}).status_code == 200
