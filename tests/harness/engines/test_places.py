"""Places that ranks must work in: any working folder, any TMPDIR, and a shell with a torchrun's leftovers."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from harness.config.yaml import ConfigError
from harness.engines import launcher
from harness.engines.environment import import_environment
from harness.serving.transport import Addresses, SocketFolderError, dealer, router
from tests.fixtures.commands import LIMIT_S, QUICK, environment, record_of, run

SHADOWS = ("torch", "random", "models", "conf", "schedulers", "numpy", "hydra", "logging", "typing", "json")


@pytest.fixture
def shadowed(tmp_path: Path) -> Path:
    """Return a working folder whose modules have the names of others."""
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text('raise SystemExit(f"shadowed: {__name__}")\n')
    return tmp_path


SCRIPT = "import sys; from harness.__main__ import main; main()"  # what pip writes for `triptych`


@pytest.mark.parametrize("start", [["-m", "harness"], ["-P", "-c", SCRIPT]], ids=["module", "script"])
@pytest.mark.parametrize("path", [None, "", ":"])
def test_the_command_imports_nothing_from_the_working_folder(
    shadowed: Path, path: str | None, start: list[str]
) -> None:
    """An empty entry of PYTHONPATH means the working folder too."""
    root = str(Path(launcher.__file__).parents[2])
    variables = environment() | {"PYTHONPATH": root if path is None else f"{path}:{root}"}
    done = subprocess.run(
        [sys.executable, *start, "request.height=65"],
        cwd=shadowed,
        env=variables,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 2
    assert "the nearest this model can make is 64 or 72" in done.stderr


def test_a_child_imports_nothing_from_the_working_folder(shadowed: Path) -> None:
    code = "import random, conf, models, schedulers, typing; print(models.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=shadowed,
        env=environment() | import_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    assert Path(done.stdout.strip()).parents[1] == Path(launcher.__file__).parents[2]


def test_an_empty_entry_of_the_import_path_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f":/mine:{os.pathsep}")
    assert import_environment()["PYTHONPATH"].split(":")[1:] == ["/mine"]


@pytest.mark.slow
def test_ranks_run_in_any_folder_with_any_temporary_folder(shadowed: Path) -> None:
    long = shadowed / ("x" * 200)
    long.mkdir()
    folder = shadowed / "run"
    done = subprocess.run(
        [sys.executable, "-m", "harness", *QUICK, "parallel=dp2", "request.prompt=狐", f"hydra.run.dir={folder}"],
        cwd=shadowed,
        env=environment() | {"TMPDIR": str(long), "PYTHONPATH": str(Path(launcher.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert record_of(folder).samples[0].prompt == "狐"
    assert list(long.glob("triptych*")) == []


@pytest.mark.parametrize("length", [1, 60, 100, 200])
def test_sockets_bind_whatever_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    parent = tmp_path / ("é" * (length // 2) or "t")
    parent.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(parent))
    addresses, context = Addresses.private(), zmq.Context()
    try:
        assert addresses.folder.stat().st_mode & 0o777 == 0o700
        server, client = router(context, addresses.requests), dealer(context, addresses.requests)
        client.send(b"hello")
        assert server.poll(10_000)
    finally:
        context.destroy(linger=0)
        addresses.remove()
    assert not addresses.folder.exists()


def test_no_short_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 120)))
    monkeypatch.setattr("harness.serving.transport.MAX_SOCKET_PATH_BYTES", 20)
    with pytest.raises(SocketFolderError, match=r"at most 20 bytes.*set TMPDIR to a short path"):
        Addresses.private()


WHOLE = {name: "0" for name in launcher.REQUIRED} | {launcher.RUN_ID: "none", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (launcher.RUN_ID, *launcher.REQUIRED, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "names",
    [["RANK"], ["RANK", "WORLD_SIZE", "MASTER_ADDR"], [launcher.RUN_ID], sorted({*WHOLE} - {"LOCAL_RANK"})],
    ids=" ".join,
)
def test_leftovers_of_a_torchrun_are_named_with_what_to_unset(variables: pytest.MonkeyPatch, names: list[str]) -> None:
    for name in names:
        variables.setenv(name, WHOLE[name])
    with pytest.raises(ConfigError, match="but not ") as refused:
        launcher.is_under_torchrun()
    assert all(f"-u {name}" in str(refused.value) for name in names)


def test_a_torchrun_that_has_ended_is_told_from_one_that_runs(variables: pytest.MonkeyPatch) -> None:
    assert not launcher.is_under_torchrun()
    with socket.create_server(("127.0.0.1", 0)) as agent:
        port = str(agent.getsockname()[1])
        for name, value in (WHOLE | {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
            variables.setenv(name, value)
        assert launcher.is_under_torchrun()
    with pytest.raises(ConfigError, match=f"no torchrun answers at 127.0.0.1:{port}"):
        launcher.is_under_torchrun()


def test_the_command_says_it_before_it_starts_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    done = run([sys.executable, "-m", "harness", f"hydra.run.dir={tmp_path / 'run'}"])
    assert done.returncode == 2
    assert done.stderr.startswith("triptych: RANK is set, but not ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
