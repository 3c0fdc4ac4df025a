"""Servers of other projects under task=load: each field where it is read, every image checked, none filed as native."""

import asyncio
import base64
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from rich.console import Console

from harness.config.load import Dialect, Transport
from harness.metrics.load import RequestRow
from harness.records import load
from harness.records.record import Record, Status
from harness.resolve.compose import ConfigError, ResolvedRun, compose_run
from harness.tasks.load import entry, http
from harness.tasks.load.answers import read_refusal
from harness.tasks.load.arrivals import ArrivalSchedule, ForeignRequest
from harness.tasks.load.dialects import Wire
from harness.tasks.load.run import REQUESTS_FILE
from tests.fixtures.commands import record_of
from tests.fixtures.foreign_server import SIZE, Answer, ForeignServer, as_json, foreign_server, images, png

QUICK = ["task=load", "load.transport=http", "load.warmup_s=0", "load.requests=3", "load.clients=1", "logger=json"]
REQUESTED = ["request.steps=7", "request.guidance=2.5", "request.negative_prompt=blur", "request.seed=40"]
SIZED = ["request.height=64", "request.width=96", "request.samples_per_prompt=2"]


def run_load(tmp_path: Path, server: ForeignServer, *overrides: str) -> Status:
    """Load a running fake and return the status of the run in `tmp_path`."""
    own = [f"load.url={server.url}", f"load.dialect={server.dialect}", "request.prompts=[red fox,rocket]"]
    run = replace(compose_run([*QUICK, *own, *overrides]), folder=tmp_path / "run")
    entry.check(run)
    return entry.execute(run, Console(quiet=True))


def rows_of(tmp_path: Path) -> list[RequestRow]:
    """Return the requests of the run in `tmp_path`."""
    lines = (tmp_path / "run" / REQUESTS_FILE).read_bytes().splitlines()
    return [msgspec.json.decode(line, type=RequestRow) for line in lines]


def expected_bodies(dialect: str) -> list[dict[str, Any]]:
    """Return what the API of each project reads, field by field."""
    found = []
    for number, prompt in enumerate(["red fox", "rocket", "red fox"]):
        common = {"prompt": prompt, "n": 2, "size": "96x64", "response_format": "b64_json"}
        own = {"seed": 40 + 2 * number, "negative_prompt": "blur"}
        diffusion = {"model": "some/model", "num_inference_steps": 7, "guidance_scale": 2.5, **own}
        apart = {
            "openai": {"model": "some/model"},
            "sglang": diffusion,
            "vllm_omni": diffusion,
            "triptych": {"triptych": {"steps": 7, "guidance": 2.5, "timeout_s": 600.0, **own}},
        }
        found.append(common | apart[dialect])
    return found


@pytest.mark.parametrize("dialect", ["triptych", "openai", "sglang", "vllm_omni"])
def test_each_dialect_sends_every_field_where_its_server_reads_it(tmp_path: Path, dialect: str) -> None:
    with foreign_server(ForeignServer(dialect)) as server:
        status = run_load(tmp_path, server, *SIZED, *([] if dialect == "openai" else REQUESTED))
    assert status.state == "ok", status.error
    assert server.bodies == expected_bodies(dialect)
    record = record_of(tmp_path / "run")
    assert record.load is not None
    assert record.load.outcomes == {"ok": 3}
    assert record.load.sizes == {"96x64": 3}
    assert record.load.server is not None
    assert (record.load.server.models, record.load.server.dialect) == (["some/model"], dialect)
    nested = server.bodies[0].get("triptych", {})
    assert record.load.server.fields == sorted({*server.bodies[0], *nested} - {"triptych"})


def test_a_foreign_server_is_filed_as_external_with_what_was_sent_and_nothing_else(tmp_path: Path) -> None:
    with foreign_server(ForeignServer("sglang")) as server:
        extra = "load.extra_body={true_cfg_scale: 4.0}"
        assert run_load(tmp_path, server, "request.steps=7", extra, "parallel=dp2", "model.name=mine").state == "ok"
    record: Record = record_of(tmp_path / "run")
    assert record.engine.name == "external"
    assert set(record.config) == {"task", "load", "dataset", "logger", "tags", "notes", "meta", "request", "serve"}
    assert record.config["request"] == {
        "prompts": ["red fox", "rocket"],
        "samples_per_prompt": 1,
        "steps": 7,
        "seed": 0,
    }
    assert server.bodies[0] == {
        "prompt": "red fox",
        "n": 1,
        "model": "some/model",
        "response_format": "b64_json",
        "num_inference_steps": 7,
        "seed": 0,
        "true_cfg_scale": 4.0,
    }
    assert (record.provenance.world_size, record.provenance.hardware.device) == (0, "external")
    assert "synchronised" not in record.provenance.timing
    assert record.load is not None
    assert record.load.sizes == {SIZE: 3}
    row = rows_of(tmp_path)[0]
    assert (row.steps, row.height, row.width, row.size) == (7, None, None, SIZE)
    table = load(tmp_path)
    assert table["engine.name"][0] == "external"
    assert not [column for column in table if column.startswith(("model.", "scheduler.", "parallel.", "attention.b"))]


def html(body: dict[str, Any]) -> Answer:
    return 200, "text/html; charset=utf-8", b"<!doctype html>\n<title>It works</title>"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (html, "text/html that begins '<!doctype html> <title>It works</title>', not JSON"),
        (lambda body: images(body, "32x32"), "image 0 is 32x32, and 96x64 was requested"),
        (lambda body: as_json({"data": [{"url": "http://127.0.0.2/a.png"}] * 2}), "only the measured server is asked"),
    ],
)
def test_what_is_not_the_requested_image_is_one_line_and_no_good_answer(
    tmp_path: Path, answer: Any, message: str
) -> None:
    with foreign_server(ForeignServer("sglang", answer)) as server:
        status = run_load(tmp_path, server, *SIZED)
    assert status.state == "failed"
    assert (status.error or "").startswith("of 3 answers 3 were not the images requested: ")
    assert message in (status.error or "")
    assert "\n" not in (status.error or "")
    record = record_of(tmp_path / "run")
    assert record.load is not None
    assert record.load.outcomes == {"invalid": 3}
    assert (record.load.latency_ms, record.load.throughput_per_s, record.load.sizes) == (None, 0.0, {})


IMAGE = base64.b64encode(png("96x64")).decode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"b64_json": IMAGE}], "1 images came, and 2 were requested"),
        ([{"b64_json": IMAGE}, {"b64_json": base64.b64encode(png("96x65")).decode()}], "image 1 is 96x65, and 96x64"),
        ([{"b64_json": IMAGE[:80]}] * 2, "image 0 cannot be decoded"),
        ([{"b64_json": "%"}] * 2, "image 0 is not base64"),
        ([{"url": "/files/9.png"}] * 2, "image 0 is not at its url: HTTP 404"),
        ([{}, {}], "image 0 has neither b64_json nor url"),
        (None, "the answer is not one of an images API"),
        ([{"b64_json": IMAGE}, {"url": f"data:image/png;base64,{IMAGE}"}], ""),
    ],
)
def test_every_image_of_an_answer_is_checked(data: object, message: str) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404) if request.method == "GET" else httpx.Response(200, json={"data": data})

    async def drive() -> RequestRow:
        requests = iter([ForeignRequest("r", ["x"], samples_per_prompt=2, height=64, width=96)])
        async with httpx.AsyncClient(base_url="http://fake", transport=httpx.MockTransport(answer)) as client:
            return (await http.drive(client, ArrivalSchedule([0.0]), requests, wire=Wire(Dialect.sglang))).rows[0]

    row = asyncio.run(drive())
    assert (row.outcome, row.size) == (("invalid", "") if message else ("ok", "96x64"))
    assert row.message.startswith(message)


def test_an_image_behind_a_url_of_the_same_server_is_fetched(tmp_path: Path) -> None:
    with foreign_server(ForeignServer("openai", lambda body: as_json({"data": [{"url": "/files/0.png"}]}))) as server:
        assert run_load(tmp_path, server).state == "ok"
    assert server.paths.count("/files/0.png") == 3
    found = record_of(tmp_path / "run").load
    assert found is not None
    assert found.sizes == {SIZE: 3}


@pytest.mark.parametrize(
    ("server", "overrides", "line"),
    [
        (ForeignServer("triptych", owner="vllm"), [], r"owned_by=vllm; use load.dialect=vllm_omni"),
        (ForeignServer("sglang", models=["a", "b"]), [], r"several models; give load.model, one of a, b"),
        (ForeignServer("sglang"), ["load.model=b"], r"load.model=b is not a model of .*; it has some/model"),
        (ForeignServer("openai", models=[]), [], r"does not say which models it has; give load.model"),
        (ForeignServer("openai", key="k"), [], r"HTTP 401 to OPENAI_API_KEY, no key: it is not set; set the right one"),
    ],
)
def test_a_server_that_cannot_be_measured_so_is_one_line_before_any_image(
    tmp_path: Path, server: ForeignServer, overrides: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with foreign_server(server):
        status = run_load(tmp_path, server, *overrides)
    assert status.state == "failed"
    with pytest.raises(AssertionError, match=line):
        raise AssertionError(status.error)
    assert server.bodies == []


def test_a_page_and_a_closed_port_are_no_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with foreign_server(ForeignServer("sglang")) as server:
        monkeypatch.setattr(server, "get", lambda path: html({}))
        status = run_load(tmp_path / "page", server)
    assert "answers /v1/models with text/html that begins '<!doctype html>" in (status.error or "")
    closed = run_load(tmp_path / "closed", server)
    assert f"load.url={server.url}: no server answers there" in (closed.error or "")


def test_a_server_that_refuses_the_warm_up_is_not_loaded(tmp_path: Path) -> None:
    def refuse(body: dict[str, Any]) -> Answer:
        return as_json({"detail": [{"loc": ["body", "n"], "msg": "too many"}]}, 422)

    with foreign_server(ForeignServer("vllm_omni", refuse)) as server:
        status = run_load(tmp_path, server, "load.warmup_s=0.05")
    assert "no request of the warm-up succeeded; the first was rejected: HTTP 422" in (status.error or "")


@pytest.mark.parametrize(
    ("status", "body", "own", "outcome", "message"),
    [
        (429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, False, "busy", "slow down"),
        (500, {"error": {"message": "m", "code": 500}}, False, "failed", "m"),
        (400, {"detail": "bad size"}, False, "rejected", "HTTP 400: bad size"),
        (408, {"error": {"code": "expired", "message": "late"}}, True, "expired", "late"),
        (409, {"error": {"code": "cancelled", "message": "m"}}, True, "cancelled", "m"),
        (502, "<html>Bad gateway", False, "failed", "HTTP 502: application/json that begins '\"<html>Bad gateway\"'"),
    ],
)
def test_every_server_s_errors_become_an_outcome_and_a_line(
    status: int, body: object, own: bool, outcome: str, message: str
) -> None:
    refusal = read_refusal(httpx.Response(status, json=body), own)
    assert refusal.kind == outcome
    assert refusal.message == message or isinstance(body, str)
    page = read_refusal(httpx.Response(502, text="<html>Bad gateway"), own)
    assert page.message.startswith("HTTP 502: text/plain that begins '<html>Bad")


@pytest.fixture(scope="module")
def foreign() -> ResolvedRun:
    """Return a run against a server whose address nobody listens on."""
    return compose_run(["task=load", "load.transport=http", "load.url=http://127.0.0.1:9", "request.prompt=x"])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"request.prompts": None}, "add request.prompt, or dataset.file"),
        ({"load.url": "localhost:8000"}, "give the root of a server, such as http://127.0.0.1:8000"),
        ({"load.url": "http://h:8000/v1"}, "is a route of a server; give its root, http://h:8000"),
        ({"load.url": "http://u:p@h"}, "put the key into OPENAI_API_KEY"),
        (
            {"load.dialect": Dialect.openai, "request.steps": 4},
            "request.steps=4 is not in the API of load.dialect=open",
        ),
        ({"load.dialect": Dialect.openai, "request.seed": 4}, "drop it, or use triptych or sglang or vllm_omni"),
        ({"load.dialect": Dialect.openai, "load.steps": [4]}, "load.steps=4 is not in the API of load.dialect=openai"),
        ({"load.dialect": Dialect.vllm_omni, "request.steps": 201}, "load.dialect=vllm_omni takes 1 to 200"),
        ({"load.dialect": Dialect.sglang, "request.samples_per_prompt": 11}, "load.dialect=sglang takes 1 to 10"),
        ({"request.height": 64}, "give both request.height and request.width"),
        ({"load.dialect": Dialect.sglang, "load.extra_body": {"seed": 1}}, "load.extra_body has seed"),
        ({"load.url": None, "load.dialect": Dialect.sglang}, "load.dialect is for a server that runs already"),
        ({"request.frames": 5}, "request.frames=5; load.url is measured with images"),
        ({"load.transport": Transport.zmq}, "add load.transport=http"),
    ],
)
def test_what_a_server_would_ignore_is_refused(foreign: ResolvedRun, changes: dict[str, object], line: str) -> None:
    run = replace(foreign, config=copy.deepcopy(foreign.config))
    for key, value in changes.items():
        group, name = key.split(".")
        setattr(getattr(run.config, group), name, value)
    with pytest.raises(ConfigError, match=line):
        entry.check(run)


def test_a_size_beyond_this_project_s_model_is_the_other_server_s_matter() -> None:
    large = ["request.height=1537", "request.width=2048", "request.prompt=x"]
    entry.check(compose_run(["task=load", "load.transport=http", "load.url=http://127.0.0.1:9", *large]))


def test_prompts_of_a_data_set_are_sent_in_turn_with_their_own_fields(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a"}, {"prompt": "b", "seed": 9, "size": "96x64", "negative_prompt": "c"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with foreign_server(ForeignServer("vllm_omni")) as server:
        run = compose_run([*QUICK, f"load.url={server.url}", "load.dialect=vllm_omni", f"dataset.file={file}"])
        entry.check(run)
        assert entry.execute(replace(run, folder=tmp_path / "run"), Console(quiet=True)).state == "ok"
        shown = [(b["prompt"], b["seed"], b.get("size"), b.get("negative_prompt")) for b in server.bodies]
        with pytest.raises(ConfigError, match=r"prompts.jsonl: line 2: negative_prompt=c is not in the API"):
            entry.check(compose_run([*QUICK, f"load.url={server.url}", "load.dialect=openai", f"dataset.file={file}"]))
    assert shown == [("a", 0, None, None), ("b", 9, "96x64", "c"), ("a", 2, None, None)]
    assert "prompts" not in record_of(tmp_path / "run").config["request"]
