"""Runs of somebody who is logged in go offline if the wandb server does not answer, for the whole process."""

import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from harness.config.schema import WandbConfig, WandbMode
from harness.loggers import connection
from harness.loggers.wandb import connected_mode, log_failure, mode_notes
from harness.records import load
from harness.records.record import Status
from tests.fixtures.commands import record_of, run, status_of


@pytest.fixture(autouse=True)
def logged_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    connection.server.cache_clear()
    yield
    connection.server.cache_clear()


@pytest.fixture
def silent() -> Iterator[str]:
    """Yield the address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Answers(BaseHTTPRequestHandler):
    """A server that answers every question alike, and counts them."""

    code, body = 200, b'{"data": {}}'
    requested: list[str]

    def do_POST(self) -> None:
        self.requested.append(self.path)
        self.send_response(self.code)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def start_server(code: int, body: bytes) -> tuple[HTTPServer, list[str]]:
    requested: list[str] = []
    handler = type("Handler", (Answers,), {"code": code, "body": body, "requested": requested})
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server, requested


@pytest.mark.parametrize(
    ("code", "body", "mode"),
    [
        (200, b'{"data": {}}', "online"),
        (401, b"who are you?", "online"),
        (403, b"the proxy does not allow this", "offline"),
        (502, b"bad gateway", "offline"),
        (200, b"[]", "offline"),
        (200, b"<html>log in to the hotel's network</html>", "offline"),
    ],
)
def test_only_an_answer_of_wandb_is_one(monkeypatch: pytest.MonkeyPatch, code: int, body: bytes, mode: str) -> None:
    server, requested = start_server(code, body)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}/")
    try:
        assert [connected_mode(WandbMode.auto), connected_mode(WandbMode.online)] == [mode, mode]
        assert connected_mode(WandbMode.offline) == "offline"
        assert len(mode_notes(WandbMode.auto)) == (mode == "offline")
    finally:
        server.shutdown()
        server.server_close()
    assert connected_mode(WandbMode.auto) == mode  # as long as this process lives
    assert requested == ["/graphql"]


def test_a_server_that_never_answers_is_left_after_a_while(
    monkeypatch: pytest.MonkeyPatch, silent: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connection, "ANSWER_S", 0.2)
    monkeypatch.setenv("WANDB_BASE_URL", silent)
    assert [connected_mode(WandbMode.auto) for _ in range(3)] == ["offline"] * 3
    (note,) = mode_notes(WandbMode.auto)
    assert silent in note
    assert capsys.readouterr().err.count("wandb sync") == 1
    assert mode_notes(WandbMode.offline) == mode_notes(WandbMode.disabled) == []


def test_a_port_where_nobody_listens_is_no_server(monkeypatch: pytest.MonkeyPatch, silent: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    assert connected_mode(WandbMode.auto) == "offline"
    assert "refused" in mode_notes(WandbMode.auto)[0]


def test_a_server_that_stops_answering_is_contacted_for_no_further_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """wandb itself waits for the server; it answered at first."""
    monkeypatch.setenv("WANDB_BASE_URL", silent)
    monkeypatch.setattr(connection, "_fault", lambda url: None)
    monkeypatch.setattr("harness.loggers.wandb.INIT_TIMEOUT_S", 2.0)
    for name in ("a", "b"):
        log_failure(WandbConfig(mode=WandbMode.auto), {}, tmp_path / name, "bench", Status("failed", "planted"))
        assert len(list(tmp_path.glob(f"{name}/wandb/offline-run-*/*.wandb"))) == 1
    assert len(list(tmp_path.glob("*/wandb/run-*"))) == 1
    assert capsys.readouterr().err.count("wandb sync") == 1


@pytest.mark.slow
def test_a_whole_sweep_goes_offline_with_a_note_in_each_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    """Two jobs that run and one that is refused; the server is checked once."""
    variables = f"import os; os.environ.update(WANDB_API_KEY={'x' * 40!r}, WANDB_BASE_URL={silent!r})"
    code = f"{variables}; from harness.cli import main; main()"
    quick = ["launch.mode=inprocess", "launch.threads_per_rank=1", "request.prompt=fox", "request.steps=1,2,0"]
    done = run([sys.executable, "-c", code, "-m", *quick, f"hydra.sweep.dir={tmp_path}"])
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("wandb sync") == 1
    table = load(tmp_path)
    for folder, state in zip(table["folder"], table["state"], strict=True):
        assert len(list(Path(folder).glob("wandb/offline-run-*"))) == 1
        if state == "ok":
            assert any(silent in note for note in record_of(Path(folder)).notes)
        else:
            assert "request.steps=0" in str(status_of(Path(folder)).error)
    assert sorted(table["state"]) == ["failed", "ok", "ok"]
