"""Ranks that nobody can reach, that come back without imports, and that end with whoever started them."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from harness.engines import rendezvous
from harness.engines.fork_agent import ForkServerProcess
from harness.engines.fork_server import AgentOrder, ForkServer
from harness.engines.processes import RANK_NAME, ProcessHandle, children, process_name
from harness.engines.torchrun import TorchrunEngine, post_mortem
from harness.messages import EngineInfo
from harness.resolve.compose import compose_run, to_yaml
from harness.resolve.request import to_message
from harness.serving.transport import EngineGone
from harness.tasks.load.server import descendants
from tests.fixtures.commands import parent, processes_about, sockets_listening, wait_for

OVERRIDES = ["task=serve", "launch.threads_per_rank=1", "parallel=dp2", "request.steps=2", "request.prompt=rocket"]
RUN = compose_run(OVERRIDES)


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    """Return a fork server in an environment that names a network for gloo, as for ranks on several machines."""
    networks = [name for _, name in socket.if_nameindex() if not name.startswith("lo")]
    with pytest.MonkeyPatch.context() as variables, ForkServer() as server:
        variables.setenv("GLOO_SOCKET_IFNAME", networks[0] if networks else "none")
        yield server


@contextmanager
def started(folder: Path, fork_server: ForkServer) -> Iterator[tuple[TorchrunEngine, EngineInfo]]:
    """Start two ranks, and end them."""
    os.environ.pop("PYTEST_CURRENT_TEST", None)  # it differs between tests, and another environment is another server
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(RUN.config))
    engine = TorchrunEngine(RUN.config, folder, fork_server)
    try:
        yield engine, engine.start(lambda info: None)
    finally:
        engine.kill()


def generate(engine: TorchrunEngine) -> None:
    result, _ = engine.generate(to_message(RUN.config.request), lambda progress: None)
    assert len(result.samples) == 1


def reason_of(engine: TorchrunEngine) -> str:
    """Return why an engine is gone, once it says so."""
    reasons: list[str] = []

    def is_gone() -> bool:
        try:
            engine.check_alive()
        except EngineGone as error:
            reasons.append(str(error))
        return bool(reasons)

    wait_for(is_gone, "the engine to know", 10)
    return reasons[0]


def test_no_process_of_an_engine_listens_beyond_this_machine(tmp_path: Path, fork_server: ForkServer) -> None:
    """An agent of `torchrun --standalone` listens on every interface."""
    with started(tmp_path, fork_server) as (engine, info):
        generate(engine)
        agent = parent(info.pids[0])
        assert agent is not None
        family = [pid for pid in descendants(os.getpid()) if pid in processes_about(tmp_path)]
        assert {agent, *info.pids} < {*family}
        found = sockets_listening(family)
        assert found, "gloo's ranks listen somewhere"
        assert all(address.is_loopback for address in found), found
        assert engine.addresses.folder.stat().st_mode & 0o777 == 0o700


def test_an_agents_temporary_files_are_out_of_reach_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user of TMPDIR could plant a pickle: PyTorch reads the error of a forked rank from a temporary file."""
    said = tmp_path / "said"
    monkeypatch.setattr(rendezvous, "run_torchrun", lambda options: said.write_text(tempfile.gettempdir()))
    order = AgentOrder(str(tmp_path), str(tmp_path / "sockets"), [], {}, str(tmp_path / "log"), "")
    orders, owner = socket.socketpair()
    with orders, owner:
        server, parent_id = ForkServerProcess(orders, os.getpid()), os.getpid()
        pid = os.fork()
        if pid == 0:
            server._be_agent(order, parent_id)
        assert os.waitpid(pid, 0)[1] == 0, (tmp_path / "log").read_text()
    assert said.read_text() == order.sockets


def test_ranks_that_follow_dead_ones_are_forked_from_the_same_imports(tmp_path: Path, fork_server: ForkServer) -> None:
    with started(tmp_path / "a", fork_server) as (engine, info):
        server = parent(parent(info.pids[0]) or 0)
        handles = [handle for pid in info.pids if (handle := ProcessHandle.open(pid)) is not None]
        os.kill(info.pids[1], signal.SIGKILL)
        assert reason_of(engine).startswith("rank 1 died with SIGKILL")
        engine.kill()
        assert len(handles) == 2
        assert all(handle.has_ended() for handle in handles)
    with started(tmp_path / "b", fork_server) as (engine, info):
        assert parent(parent(info.pids[0]) or 0) == server
        assert [process_name(pid) for pid in info.pids] == ["triptych-0", "triptych-1"]
        generate(engine)


def test_stopped_ranks_end_with_their_server_and_the_next_ranks_get_a_new_one(
    tmp_path: Path, fork_server: ForkServer
) -> None:
    """A process that is stopped runs no code of its own."""
    with started(tmp_path / "a", fork_server) as (engine, info):
        agent = parent(info.pids[0]) or 0
        server = parent(agent) or 0
        for pid in (*info.pids, agent):
            os.kill(pid, signal.SIGSTOP)
        handles = [handle for pid in (*info.pids, agent) if (handle := ProcessHandle.open(pid)) is not None]
        os.kill(server, signal.SIGKILL)
        assert all(handle.has_ended(10.0) for handle in handles)
        reason_of(engine)
    with started(tmp_path / "b", fork_server) as (engine, info):
        assert parent(parent(info.pids[0]) or 0) != server
        generate(engine)


def test_a_process_that_is_stopped_while_ranks_load_ends_the_wait(
    tmp_path: Path, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.engines.torchrun.STOPPED_LOOKS", 3)
    stopped: list[int] = []

    def stop_a_rank(info: EngineInfo | None) -> None:
        ranks = [pid for pid in descendants(os.getpid()) if process_name(pid) == RANK_NAME.format(rank=1)]
        if not stopped and ranks:
            os.kill(ranks[0], signal.SIGSTOP)
            stopped.append(ranks[0])

    monkeypatch.setattr(RUN.config.launch, "start_timeout_s", 30.0)
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.yaml").write_text(to_yaml(RUN.config))
    engine = TorchrunEngine(RUN.config, tmp_path, fork_server)
    with pytest.raises(EngineGone, match=r"process \d+ was stopped by a signal while the ranks were loading"):
        engine.start(stop_a_rank)
    engine.kill()
    wait_for(lambda: process_name(stopped[0]) == "", "the stopped rank to end", 10)


def test_a_fork_server_that_does_not_answer_in_time_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RUN.config.launch, "start_timeout_s", 0.3)  # it still imports
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.yaml").write_text(to_yaml(RUN.config))
    with ForkServer() as fork_server:
        engine = TorchrunEngine(RUN.config, tmp_path, fork_server)
        with pytest.raises(EngineGone, match=r"not ready within 0.3 s"):
            engine.start(lambda info: None)
        engine.kill()
        assert [server.process.poll() for server in fork_server._servers.values()] == [-signal.SIGKILL]


OWNER = """
import os, sys
from pathlib import Path
from harness.config.yaml import from_yaml
from harness.engines.fork_server import ForkServer
from harness.engines.torchrun import TorchrunEngine
folder = Path(sys.argv[1])
engine = TorchrunEngine(from_yaml((folder / "config.yaml").read_text()), folder, ForkServer())
def leave(info):
    print(engine.addresses.folder, flush=True)
    os._exit(0)
engine.start(leave)
"""


def test_an_owner_that_ends_while_its_fork_server_imports_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.yaml").write_text(to_yaml(RUN.config))
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    done = subprocess.run(command, check=True, timeout=60, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: not processes_about(tmp_path), "the fork server to end")
    assert not Path(done.stdout.strip()).exists()
    assert not (tmp_path / "logs" / "rank0.log").exists()


def test_a_handle_is_of_one_process_and_knows_how_it_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        handle = ProcessHandle.open(child.pid)
        assert handle is not None
        assert not handle.has_ended()
        assert handle.exit_code is None
        assert child.pid in children(os.getpid())
        handle.send(signal.SIGKILL)
        assert handle.has_ended(10.0)
        assert handle.exit_code == -signal.SIGKILL
    handle.send(signal.SIGKILL)  # nobody gets it
    handle.close()
    assert ProcessHandle.open(child.pid) is None


def test_the_rank_that_died_is_named_and_not_the_one_that_lost_it(tmp_path: Path) -> None:
    lost = {"rank": 0, "message": "Connection closed by peer", "kind": "failed", "peer_lost": True}
    (tmp_path / "rank0.error.json").write_bytes(msgspec.json.encode(lost))
    assert "rank 1 died with SIGSEGV" in str(post_mortem(tmp_path, {0: 1, 1: -signal.SIGSEGV}))
    assert "rank 1 died;" in str(post_mortem(tmp_path, {1: None}))
    line = f"E1130 torch/elastic: failed (exitcode: -9) local_rank: 1 (pid: 7) of fn: run_script_path {time.time()}"
    (tmp_path / "launch.log").write_text(line)
    assert "rank 1 died with SIGKILL" in str(post_mortem(tmp_path, {0: 1, 1: None}))
