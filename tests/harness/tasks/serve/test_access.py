"""Who may use the server: keys and their file, whose requests a client sees, hosts, and pages of other sites."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from harness.cli import run_one
from harness.config.schema import RunConfig
from harness.engines.pool import new_engine
from harness.records.provenance import is_recorded
from harness.resolve.compose import ConfigError, ResolvedRun, compose_run
from harness.tasks.load.http import key_header
from harness.tasks.serve.access import (
    KEY_VARIABLE,
    AccessKeys,
    address_group,
    host_name,
    is_allowed_host,
    is_loopback,
    read_keys,
)
from harness.tasks.serve.app import make_app
from tests.fixtures.serving.fake_supervisor import FakeSupervisor

ANN, BOB = {"authorization": "Bearer of-ann"}, {"authorization": "Bearer of-bob"}
LIMIT_S = 20
REQUESTS = "/v1/requests"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose_run(["task=serve", "serve.allowed_hosts=[gpu.example]"]).config


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@asynccontextmanager
async def client_of(config: RunConfig, folder: Path, keys: AccessKeys | None) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client of a server over a fake supervisor."""
    app = make_app(config, FakeSupervisor(config), folder, keys)  # type: ignore[arg-type]
    wire = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=wire, base_url="http://127.0.0.1:8000", timeout=LIMIT_S) as client:
        yield client
    await app.state.service.close()


def talk(
    config: RunConfig, folder: Path, with_client: Callable[[httpx.AsyncClient], Any], keys: AccessKeys | None = None
) -> None:
    async def whole() -> None:
        async with asyncio.timeout(LIMIT_S), client_of(config, folder, keys) as client:
            await with_client(client)

    asyncio.run(whole())


def key_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_each_key_of_a_file_is_a_client(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = key_file(tmp_path, "# clients\nann:of-ann\n\nbare\nbob:with:colon\n")
    monkeypatch.setenv(KEY_VARIABLE, "of-env")
    keys = read_keys(replace(config.serve, host="0.0.0.0", api_key_file=str(path)))
    assert keys is not None
    found = {key: keys.client(f"Bearer {key}") for key in ("of-ann", "bare", "with:colon", "of-env", "of-an", "")}
    assert found == {
        "of-ann": "key:ann",
        "bare": "key:4",
        "with:colon": "key:bob",
        "of-env": "key:environment",
        "of-an": None,
        "": None,
    }
    assert keys.client("bearer of-ann") == "key:ann"
    assert keys.client("Basic of-ann") is None
    assert keys.client("of-ann") is None
    assert keys.client("Bearer \xff\xfe\u20ac") is None
    assert "of-ann" not in repr(vars(keys))


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("of-ann", 0o640, "can be read by others"),
        ("of-ann", 0o604, "can be read by others"),
        ("", 0o600, "has no key"),
        ("# none\n\n", 0o600, "has no key"),
        ("ann:", 0o600, "line 1 .* is no key"),
        ("of ann", 0o600, "line 1 .* is no key"),
        ("a b:of-ann", 0o600, "has the name 'a b'"),
        ("ann:same\nbob:same", 0o600, "line 2 .* repeats a key"),
        ("\x00\x01", 0o600, "is no key"),
    ],
)
def test_a_wrong_key_file_is_refused(config: RunConfig, tmp_path: Path, text: str, mode: int, words: str) -> None:
    path = key_file(tmp_path, text, mode)
    with pytest.raises(ConfigError, match=words) as raised:
        read_keys(replace(config.serve, api_key_file=str(path)))
    assert "of-ann" not in str(raised.value).replace("NAME", "")


@pytest.mark.parametrize("path", ["no/such/file", "."])
def test_a_key_file_that_is_none_is_refused(config: RunConfig, path: str) -> None:
    with pytest.raises(ConfigError, match=r"serve\.api_key_file"):
        read_keys(replace(config.serve, api_key_file=path))


def test_a_host_that_others_reach_needs_a_key_before_anything_starts(config: RunConfig, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for host in ("0.0.0.0", "::", "192.0.2.1", "gpu.example"):
            serve = replace(config.serve, host=host, port=taken.getsockname()[1])
            with pytest.raises(ConfigError, match=rf"serve\.host={host} lets other machines in"):
                run_one(ResolvedRun(replace(config, serve=serve), [], tmp_path / "run", []), new_engine)
    assert not (tmp_path / "run").exists()
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert read_keys(replace(config.serve, host=host)) is None
    for name in ("http://gpu.example", "gpu.example:80", "a b", ""):
        with pytest.raises(ConfigError, match=r"serve\.allowed_hosts"):
            read_keys(replace(config.serve, allowed_hosts=[name]))


def test_the_key_is_in_no_record() -> None:
    assert not is_recorded(KEY_VARIABLE)


def test_the_clients_of_a_load_send_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_header() == {}
    monkeypatch.setenv(KEY_VARIABLE, "of-ann")
    assert key_header() == ANN


def test_every_route_but_the_page_and_the_state_needs_the_key(config: RunConfig, tmp_path: Path) -> None:
    keys = AccessKeys({"of-ann": "ann"})

    async def with_client(client: httpx.AsyncClient) -> None:
        for path in ("/", "/page.js", "/page.css", "/health", "/ready"):
            assert (await client.get(path)).status_code == 200
        document = (await client.get("/openapi.json", headers=ANN)).json()
        routes = [(method, path) for path, methods in document["paths"].items() for method in methods]
        routes += [("get", "/openapi.json"), ("get", "/no-such-route"), ("post", "/health"), ("get", "/health/")]
        closed = [route for route in routes if route not in (("get", "/health"), ("get", "/ready"))]
        assert len(closed) >= 15
        for method, path in closed:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer "}):
                answer = await client.request(method, path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized"), (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"
        twice = [("authorization", "Bearer of-ann"), ("authorization", "Bearer of-ann")]
        assert (await client.get("/metrics", headers=twice)).status_code == 401
        assert (await client.get("/metrics", headers=ANN)).status_code == 200

    talk(config, tmp_path, with_client, keys)


def test_a_client_sees_and_cancels_its_own_requests_alone(config: RunConfig, tmp_path: Path) -> None:
    videos = replace(config, model=replace(config.model, max_frames=17, frame_multiple=4, fps=8))

    async def with_client(client: httpx.AsyncClient) -> None:
        image = (await client.post(REQUESTS, json={"prompt": "x"}, headers=ANN)).json()["id"]
        body = {"prompt": "x", "triptych": {"frames": 5, "steps": 1}}
        video = (await client.post("/v1/videos", json=body, headers=ANN)).json()["id"]
        own = [
            ("GET", f"{REQUESTS}/{image}"),
            ("GET", f"{REQUESTS}/{image}/events"),
            ("GET", f"{REQUESTS}/{image}/content/0"),
            ("GET", f"/v1/videos/{video}"),
            ("GET", f"/v1/videos/{video}/content"),
            ("DELETE", f"{REQUESTS}/{image}"),
            ("DELETE", f"/v1/videos/{video}"),
        ]
        events = await client.get(f"{REQUESTS}/{video}/events", headers=ANN)
        assert json.loads(events.text.strip().splitlines()[-1].removeprefix("data: "))["status"] == "done"
        for method, path in own:
            unknown = path.replace(image, "0" * 32).replace(video, "0" * 32)
            answers = [await client.request(method, found, headers=BOB) for found in (path, unknown)]
            assert [answer.status_code for answer in answers] == [404, 404], path
        for path in (REQUESTS, "/v1/videos"):
            assert (await client.get(path, headers=BOB)).json()["data"] == []
            assert len((await client.get(path, headers=ANN)).json()["data"]) == (2 if path == REQUESTS else 1)
        for method, path in own:
            assert (await client.request(method, path, headers=ANN)).status_code < 300, path

    talk(videos, tmp_path, with_client, AccessKeys({"of-ann": "ann", "of-bob": "bob"}))
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert {line["request"]["client"] for line in lines} == {"key:ann"}
    assert "of-ann" not in (tmp_path / "requests.jsonl").read_text()


def test_without_keys_everybody_on_this_machine_sees_all(config: RunConfig, tmp_path: Path) -> None:
    async def with_client(client: httpx.AsyncClient) -> None:
        await client.post("/v1/images/generations", json={"prompt": "x"})
        (found,) = (await client.get(REQUESTS, headers=BOB)).json()["data"]
        assert (await client.get(f"{REQUESTS}/{found['id']}")).status_code == 200

    talk(config, tmp_path, with_client)
    assert '"client":"addr:127.0.0.1"' in (tmp_path / "requests.jsonl").read_text()


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"),
        ("GPU.example:80", "gpu.example"),
        ("[::1]:8000", "::1"),
        ("", None),
        ("[", None),
        ("a b", None),
        ("a@b", None),
        ("a:b", None),
        ("\xff", None),
        ("a:8000\n", None),
    ],
)
def test_a_host_header_is_a_name_with_a_port(header: str, name: str | None) -> None:
    assert host_name(header) == name


def test_the_host_header_has_to_name_this_server(config: RunConfig) -> None:
    serve = replace(config.serve, host="0.0.0.0")
    own = ("192.0.2.7", "::ffff:192.0.2.7")
    for name in ("localhost", "127.0.0.1", "::1", "gpu.example", "192.0.2.7"):
        assert all(is_allowed_host(name, serve, address) for address in own), name
    for name in ("evil.example", "192.0.2.8", "sub.gpu.example", "localhost.evil.example", "127.0.0.1.evil.example"):
        assert not any(is_allowed_host(name, serve, address) for address in own), name
    assert is_allowed_host("gpu1.lan", replace(serve, host="GPU1.lan"), "192.0.2.7")
    assert not is_loopback("::ffff:192.0.2.7")
    assert is_loopback("::ffff:127.0.0.1")


def test_a_client_has_a_whole_network_in_ipv6_and_one_address_in_ipv4() -> None:
    assert address_group("2001:db8::1") == address_group("2001:db8::2:3") != address_group("2001:db8:0:1::1")
    assert address_group("192.0.2.1") == address_group("::ffff:192.0.2.1") != address_group("192.0.2.2")
    assert address_group("") == ""


FORM = "multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        ({"sec-fetch-site": "cross-site"}, True),
        ({"sec-fetch-site": "same-site"}, True),
        ({"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:8000"}, False),
        ({"origin": "null"}, True),
        ({"origin": "http://127.0.0.1:9000"}, True),
        ({"origin": "\xff\xfe"}, True),
        ({"origin": "http://["}, True),
        ({"content-type": FORM, "referer": "https://evil.example/page"}, True),
        ({"content-type": "text/plain", "referer": "http://["}, True),
        ({"content-type": "application/x-www-form-urlencoded"}, True),
        ({"content-type": "text/plain"}, True),
        ({"content-type": ""}, True),
        ({"referer": "http://127.0.0.1:8000/"}, False),
        ({}, False),
    ],
)
def test_a_post_of_another_site_makes_nothing(
    config: RunConfig, tmp_path: Path, headers: dict[str, str], refused: bool
) -> None:
    async def with_client(client: httpx.AsyncClient) -> None:
        sent = {
            name: value.encode("latin-1") for name, value in ({"content-type": "application/json"} | headers).items()
        }
        answer = await client.post(REQUESTS, content=b'{"prompt": "x"}', headers=sent)
        assert answer.status_code in ((400, 403) if refused else (202,)), answer.text
        assert len((await client.get(REQUESTS)).json()["data"]) == (0 if refused else 1)

    talk(config, tmp_path, with_client)


def test_a_form_of_another_site_makes_no_video(config: RunConfig, tmp_path: Path) -> None:
    """OpenAI's clients send forms, and so can a page; a browser that sends no Origin sends a Referer."""
    videos = replace(config, model=replace(config.model, max_frames=17, frame_multiple=4, fps=8))
    fields = {"prompt": (None, "x"), "seconds": (None, "1"), "triptych[steps]": (None, "1")}

    async def with_client(client: httpx.AsyncClient) -> None:
        for site, status in ((None, 200), ("http://127.0.0.1:8000/", 200), ("https://evil.example/", 403)):
            headers = {} if site is None else {"referer": site}
            assert (await client.post("/v1/videos", files=fields, headers=headers)).status_code == status

    talk(videos, tmp_path, with_client)


def test_no_other_site_reads_an_image_or_a_list(config: RunConfig, tmp_path: Path) -> None:
    async def with_client(client: httpx.AsyncClient) -> None:
        body = {"prompt": "x", "response_format": "url"}
        link = (await client.post("/v1/images/generations", json=body)).json()["data"][0]["url"]
        for path in (link, REQUESTS, "/", "/no-such-route", "/metrics"):
            answer = await client.get(path)
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cross-origin-resource-policy"] == "same-origin"
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert "access-control-allow-origin" not in answer.headers
        assert (await client.get(link, headers={"host": "evil.example"})).status_code == 403

    talk(config, tmp_path, with_client)
