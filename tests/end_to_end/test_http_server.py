"""task=serve with real ranks: OpenAI's client, ten thousand malformed requests, foreign frames, and a clean end."""

import json
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import zmq

from harness.messages import Cancel, GenerationRequest, encode
from tests.fixtures.commands import LIMIT_S, command, processes_about, ranks, started, status_of, wait_for
from tests.fixtures.serving.http_clients import keep_to_its_document, use_images
from tests.fixtures.serving.malformed_requests import abuse

pytestmark = pytest.mark.slow


@dataclass
class Serving:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    folder: Path


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("serving") / "run"
    bounds = ("serve.port=0", "serve.max_body_kib=32", "serve.max_steps=60", "serve.head_timeout_s=0.5")
    with started(command("task=serve", *bounds, "serve.body_timeout_s=0.5", f"hydra.run.dir={folder}")) as process:
        assert process.stdout is not None
        found = re.search(r"http://127.0.0.1:\d+", process.stdout.readline())
        assert found is not None
        wait_for(lambda: httpx.get(f"{found[0]}/ready").status_code == 200, "the ranks", LIMIT_S)
        yield Serving(process, found[0], folder)


def rank(folder: Path) -> int:
    """Return the process id of a rank of the run."""
    (pid,) = ranks(folder)
    return pid


def sockets(folder: Path) -> Path:
    """Return the folder of the engine's sockets: where rank 0 listens (unix(7), /proc/net/unix)."""
    links = {os.readlink(link) for link in Path(f"/proc/{rank(folder)}/fd").iterdir() if link.is_symlink()}
    rows = [row.split() for row in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return next(Path(row[7]).parent for row in rows if len(row) > 7 and f"socket:[{row[6]}]" in links)


def send_foreign_frames(folder: Path, number: int, seed: int) -> None:
    """Send bytes that are no message, unexpected messages, and arrays without a header, to both sockets of rank 0."""
    dice, context = random.Random(seed), zmq.Context()
    good = encode(GenerationRequest("x", ["x"], steps=1, guidance=1.0, height=64, width=64))[0]
    for name in ("requests", "control"):
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 1000)
        socket.connect(f"ipc://{sockets(folder)}/{name}")
        for _ in range(number):
            torn = good[: dice.randrange(len(good))]
            frames = dice.choice(([], [b""], [dice.randbytes(60)], [torn], [torn, b"x" * 9000], encode(Cancel("no"))))
            socket.send_multipart(frames or [b""])
        socket.close()
    context.term()


def test_openais_client_generates_on_real_ranks(serving: Serving) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none") as client:
        use_images(client)


def test_requests_made_from_its_document_find_no_fault(serving: Serving) -> None:
    keep_to_its_document(serving.url, examples=3)


def test_ten_thousand_malformed_requests_leave_it_ready(serving: Serving) -> None:
    statuses = abuse(int(serving.url.rsplit(":", 1)[1]), number=10_000, seed=2)
    print(f"\n10,000 malformed requests: {dict(sorted(statuses.items()))}")
    assert max(statuses) < 500, statuses
    assert sum(statuses.values()) > 5_000
    assert max(log.stat().st_size for log in (serving.folder / "logs").rglob("*") if log.is_file()) < 2**20
    send_foreign_frames(serving.folder, 200, seed=3)
    assert httpx.get(f"{serving.url}/ready").json()["restarts"] == 0
    answer = httpx.post(
        f"{serving.url}/v1/images/generations", json={"prompt": "x", "triptych": {"steps": 2}}, timeout=LIMIT_S
    )
    assert answer.status_code == 200, answer.text


def test_a_rank_that_is_killed_is_reported_and_replaced(serving: Serving) -> None:
    requested = {"prompt": "x", "n": 8, "triptych": {"steps": 60}}
    running, waiting = (httpx.post(f"{serving.url}/v1/requests", json=requested | {"n": n}).json() for n in (8, 1))
    where = f"{serving.url}/v1/requests"
    wait_for(lambda: httpx.get(f"{where}/{running['id']}").json()["done"] > 0, "its first step")
    os.kill(rank(serving.folder), signal.SIGKILL)
    wait_for(lambda: httpx.get(f"{where}/{running['id']}").json()["status"] == "queued", "its return to the queue")
    ready = httpx.get(f"{serving.url}/ready")
    assert (ready.status_code, ready.headers["retry-after"]) == (503, "1")
    assert "SIGKILL" in ready.json()["error"]["message"]
    assert httpx.get(f"{serving.url}/health").json()["state"] == "restarting"
    wait_for(lambda: httpx.get(f"{serving.url}/ready").status_code == 200, "new ranks", LIMIT_S)
    assert httpx.get(f"{serving.url}/ready").json()["restarts"] == 1
    for request in (running, waiting):
        wait_for(lambda: httpx.get(f"{where}/{request['id']}").json()["status"] == "done", "an image", LIMIT_S)  # noqa: B023


def test_it_ends_in_order(serving: Serving) -> None:
    """This is the last test of this server: what runs ends, the status is ok, and no process is left."""
    requested = {"prompt": "x", "triptych": {"steps": 60}}
    request = httpx.post(f"{serving.url}/v1/requests", json=requested).json()
    where = f"{serving.url}/v1/requests/{request['id']}"
    wait_for(lambda: httpx.get(where).json()["status"] == "running", "its start")
    os.kill(serving.process.pid, signal.SIGTERM)
    said, _ = serving.process.communicate(timeout=LIMIT_S)
    assert serving.process.returncode == 0, said
    assert status_of(serving.folder).state == "ok"
    assert processes_about(serving.folder) == {}
    lines = [json.loads(line) for line in (serving.folder / "requests.jsonl").read_text().splitlines()]
    assert lines[-1]["request"]["request_id"] == request["id"]
    assert lines[-1]["outcome"] == "ok"
