"""Whom the wandb server does not know is refused before a process starts; a project that it will make is a note."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from harness import cli
from harness.config.schema import WandbConfig, WandbMode
from harness.config.yaml import ConfigError
from harness.loggers import connection, project
from harness.loggers.wandb import check_connection
from harness.resolve.compose import compose_run

KNOWN = {"me": ["triptych"], "team": []}


class Server(BaseHTTPRequestHandler):
    """Answers as wandb's server does, for one key, one user and one team."""

    def do_POST(self) -> None:
        requested = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        given = requested.get("variables", {})
        data: dict[str, Any] = {"serverInfo": {}}
        if "viewer" in requested["query"]:
            data = {"viewer": {"entity": "me"} if "Onll" in self.headers["Authorization"] else None}
        if "project" in requested["query"]:
            entity = given["entity"]
            found = given["project"] in KNOWN.get(entity, [])
            data = {
                "entity": {"name": entity} if entity in KNOWN else None,
                "project": {"name": "p"} if found else None,
            }
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": data}).encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made = HTTPServer(("127.0.0.1", 0), Server)
    Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "yes")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{made.server_port}")
    connection.server.cache_clear()
    project.find_project.cache_clear()
    yield
    made.shutdown()
    made.server_close()
    connection.server.cache_clear()
    project.find_project.cache_clear()


def online(**names: str) -> WandbConfig:
    return WandbConfig(WandbMode.online, **names)


def test_an_unknown_team_is_one_line_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["logger.wandb.mode=online", "logger.wandb.entity=nobody"]

    def start(*arguments: object) -> None:
        raise AssertionError("a process was started")

    with pytest.raises(ConfigError, match=r"no user or team nobody; correct logger\.wandb\.entity"):
        cli.run_one(compose_run(overrides), start)  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


def test_a_project_that_will_be_made_is_a_note_if_it_was_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_connection(online())
    check_connection(online(project="triptych"))
    check_connection(online(entity="team"))  # the default project, which nobody named
    assert capsys.readouterr().err == ""
    check_connection(online(project="tripptych"))
    assert capsys.readouterr().err.count("no project me/tripptych yet") == 1
    monkeypatch.setenv("WANDB_ENTITY", "team")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    check_connection(online())
    assert capsys.readouterr().err.count("no project team/mine yet") == 1


def test_a_wrong_or_missing_key_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "no")
    with pytest.raises(ConfigError, match="wandb login --relogin"):
        check_connection(online())
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="needs an API key"):
        check_connection(online())
    check_connection(WandbConfig(WandbMode.offline))
    check_connection(WandbConfig(WandbMode.auto))  # nobody is logged in


def test_an_agent_of_wandb_is_not_asked_for_its_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    check_connection(online(entity="nobody"))


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("logger.wandb.project=a/b", "has no /"),
        (f"logger.wandb.name={'a' * 128}", "logger.wandb.name has 128 characters; give 1 to 127"),
        ('logger.wandb.entity=""', "logger.wandb.entity has 0 characters"),
    ],
)
def test_a_name_that_wandb_does_not_take_is_refused(override: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        compose_run([override])


def test_a_project_of_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "a:b")
    with pytest.raises(ConfigError, match="WANDB_PROJECT=a:b"):
        compose_run([])
