"""What a server of real ranks survives: requests that kill, stopped processes, a full disk, a removed folder.

After each the server is ready soon, and a good request is answered. It ends in time, and leaves no process.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.fixtures.commands import LIMIT_S, command, parent, processes_about, ranks, started, status_of, wait_for
from tests.fixtures.faults import poisoned

pytestmark = pytest.mark.slow
READY_S = 30.0
STOPPED_S = 8.0
ENDS_S = 1.0


@dataclass
class Serving:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    folder: Path

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=LIMIT_S)

    def submit(self, prompt: str, steps: int = 4) -> str:
        """Queue a request and return its id."""
        body = {"prompt": prompt, "triptych": {"steps": steps}}
        answer = httpx.post(f"{self.url}/v1/requests", json=body, timeout=LIMIT_S)
        assert answer.status_code == 202, answer.text
        request_id: str = answer.json()["id"]
        return request_id

    def status(self, request_id: str) -> str:
        status: str = self.get(f"/v1/requests/{request_id}").json()["status"]
        return status

    def generate(self, prompt: str = "rocket") -> httpx.Response:
        body = {"prompt": prompt, "triptych": {"steps": 4}}
        return httpx.post(f"{self.url}/v1/images/generations", json=body, timeout=LIMIT_S)

    @property
    def restarts(self) -> int:
        found = re.search(r"^triptych_restarts_total (\d+)", self.get("/metrics").text, re.MULTILINE)
        assert found is not None
        return int(found[1])

    def is_ready(self) -> bool:
        return self.get("/ready").status_code == 200

    def is_well(self, what: str) -> None:
        """Check that the server is ready in time and answers a good request."""
        began = time.monotonic()
        wait_for(self.is_ready, f"the server after {what}", READY_S)
        print(f"{what}: ready after {time.monotonic() - began:.1f} s")
        answer = self.generate()
        assert answer.status_code == 200, answer.text


@contextmanager
def serving(folder: Path, *overrides: str, variables: dict[str, str] | None = None) -> Iterator[Serving]:
    with started(
        command("task=serve", "serve.port=0", f"hydra.run.dir={folder}", *overrides), variables or {}
    ) as process:
        assert process.stdout is not None
        found = re.search(r"http://127.0.0.1:\d+", process.stdout.readline())
        assert found is not None
        server = Serving(process, found[0], folder)
        wait_for(server.is_ready, "the ranks", LIMIT_S)
        yield server
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(LIMIT_S)
    wait_for(lambda: not processes_about(folder), "every process to end", 10)


@pytest.mark.parametrize(
    ("layout", "rank"),
    [("single", 0), ("dp2", None), ("cfg2", 1), ("tp2", 1), ("ulysses2", 1)],
    ids=lambda value: str(value),
)
def test_no_request_ends_the_service(tmp_path: Path, layout: str, rank: int | None) -> None:
    """A request that ends or hangs a rank is answered after its second death, and its neighbours are generated.

    One that kills its rank by SIGKILL, as only somebody else does, needs a third death.
    """
    with serving(tmp_path / "run", f"parallel={layout}", variables=poisoned(tmp_path, rank)) as server:
        server.is_well("the start")  # the server learns how long a step takes
        for end, deaths in (("killed", 3), ("segfault", 2), ("hangs", 2)):
            began, restarts = time.monotonic(), server.restarts
            neighbours = [server.submit("pizza")]
            poison = server.submit(end)
            neighbours.append(server.submit("red apple"))
            wait_for(lambda: server.status(poison) == "failed", f"the answer to {end}", LIMIT_S)  # noqa: B023
            print(f"{layout}, {end}: answered after {time.monotonic() - began:.1f} s")
            error = server.get(f"/v1/requests/{poison}").json()["error"]
            assert f"the ranks died {'twice' if deaths == 2 else '3 times'} with this request" in error["message"]
            server.is_well(f"{layout}, {end}")
            assert server.restarts == restarts + deaths
            assert [server.status(neighbour) for neighbour in neighbours] == ["done", "done"]
        refused = server.generate("killed")
        assert refused.status_code == 503
        assert "retry-after" not in refused.headers
        assert refused.headers["x-should-retry"] == "false"


def test_stopped_processes_go_on_or_are_replaced(tmp_path: Path) -> None:
    with serving(tmp_path / "run", "parallel=ulysses2") as server:
        server.is_well("the start")
        agent = parent(ranks(server.folder)[0])
        assert agent is not None
        for name, pid in (("server", server.process.pid), ("agent", agent)):
            restarts, running = server.restarts, server.submit("rocket", steps=100)
            wait_for(lambda: server.status(running) == "running", "its start")  # noqa: B023
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STOPPED_S)
            os.kill(pid, signal.SIGCONT)
            wait_for(lambda: server.status(running) == "done", f"the image after a stop of the {name}", LIMIT_S)  # noqa: B023
            server.is_well(f"a stop of the {name}")
            assert server.restarts == restarts
        for number in (0, 1):
            restarts, running = server.restarts, server.submit("rocket", steps=100)
            wait_for(lambda: server.status(running) == "running", "its start")  # noqa: B023
            os.kill(ranks(server.folder)[number], signal.SIGSTOP)
            wait_for(lambda: not server.is_ready(), "the stop to be found", READY_S)
            wait_for(lambda: server.status(running) == "done", f"the image after a stop of rank {number}", LIMIT_S)  # noqa: B023
            server.is_well(f"a stop of rank {number}")
            assert server.restarts == restarts + 1


@contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """Put a disk of a few MiB at a path."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(path)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def can_mount(path: Path) -> bool:
    try:
        with small_disk(path):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def full(server: Serving, disk: Path | None) -> Iterator[None]:
    """Fill the server's disk, or forbid the server to make a file larger where no disk can be mounted."""
    if disk is None:
        before = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        yield
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, before)
        return
    try:
        with (disk / "filler").open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
    except OSError:
        yield
    (disk / "filler").unlink()


def test_a_full_disk_is_said_and_heals_and_so_does_a_removed_folder(tmp_path: Path) -> None:
    disk = tmp_path / "disk" if can_mount(tmp_path / "try") else None
    folder = (disk or tmp_path) / "run"
    with nullcontext() if disk is None else small_disk(disk), serving(folder) as server:
        with full(server, disk):
            wait_for(lambda: not server.is_ready(), "the word of the disk", READY_S)
            assert "free some disk space" in server.get("/ready").json()["error"]["message"]
            refused = server.generate()
            assert (refused.status_code, refused.json()["error"]["code"]) == (507, "not_saved")
        server.is_well("a full disk")
        shutil.rmtree(server.folder)
        wait_for((server.folder / "config.yaml").exists, "the folder", READY_S)
        server.is_well("a removed folder")
        restarts = server.restarts
        os.kill(ranks(server.folder)[0], signal.SIGKILL)
        wait_for(lambda: server.restarts == restarts + 1, "new ranks", READY_S)
        server.is_well("a removed folder and dead ranks")
        assert server.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_server_ends_what_runs_and_refuses_the_rest(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path / "run", "serve.max_batch=1") as server:
        running, waiting = server.submit("rocket", steps=200), server.submit("pizza")
        wait_for(lambda: server.status(running) == "running", "its start")
        server.process.send_signal(number)
        wait_for(lambda: server.status(waiting) == "failed", "the answer to what waits")
        ready = server.get("/ready")
        assert (ready.status_code, ready.headers["retry-after"]) == (503, "1")
        assert server.generate().status_code == 503
        said, _ = server.process.communicate(timeout=LIMIT_S)
        assert server.process.returncode == 0, said
        lines = (server.folder / "requests.jsonl").read_text().splitlines()
        assert [re.search(r'"outcome":"(\w+)"', line)[1] for line in lines] == ["not_serving", "ok"]  # type: ignore[index]
        assert status_of(server.folder).state == "ok"


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    with serving(tmp_path / "run", "parallel=dp2") as server:
        running = server.submit("rocket", steps=250)
        wait_for(lambda: server.status(running) == "running", "its start")
        server.process.send_signal(signal.SIGINT)
        wait_for(lambda: server.get("/ready").json()["error"]["message"].startswith("stopping"), "the first one")
        server.process.send_signal(signal.SIGINT)
        began = time.monotonic()
        server.process.communicate(timeout=LIMIT_S)
        print(f"ended after {time.monotonic() - began:.2f} s")
        assert time.monotonic() - began < ENDS_S + 1.0  # of a busy machine
        assert server.process.returncode == 130
        assert processes_about(server.folder) == {}
        assert status_of(server.folder).state in ("cancelled", "failed")
