"""A server of task=serve as a child process: start it, watch its memory, kill its ranks on purpose, and stop it."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray

from harness.engines.environment import OWNER, import_environment
from harness.engines.processes import RANK_NAME, process_name
from harness.metrics.load import Chaos, MemoryGrowth, RankKill
from harness.serving.transport import EngineGone

RANK = re.compile(RANK_NAME.format(rank=r"(\d+)"))  # the name of a rank's process
URL = re.compile(r" on (http://\S+),")
SAMPLE_S = 1.0
POLL_S = 0.2
STOP_S = 60.0
LEAK_S = 5.0  # the time for the processes of an ended server to disappear


class ServerProcess:
    """A server that this process has started; as a context manager, it ends the server on exit.

    Args:
        overrides: The overrides of the server's run.
        folder: The folder of the server's run.
        start_timeout_s: The time limit until the server is ready, seconds.

    Attributes:
        leaked: The number of the server's processes that still ran after its end.
        killed: The ranks that were killed on purpose.
    """

    def __init__(self, overrides: Sequence[str], folder: Path, start_timeout_s: float) -> None:
        self.leaked = 0
        self.killed: list[RankKill] = []
        self._samples: list[tuple[float, float]] = []
        self._log = folder.with_name("server.log")
        self._start_timeout_s = start_timeout_s
        own = ["task=serve", "serve.port=0", f"hydra.run.dir={folder}", "compare.a=null", "compare.b=null"]
        environment = os.environ | import_environment() | {"PYTHONUNBUFFERED": "1", OWNER: str(os.getpid())}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness", *overrides, *own],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )

    def __enter__(self) -> ServerProcess:
        """Return this server."""
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the server."""
        self.stop()

    async def wait_ready(self) -> str:
        """Wait until the server's ranks are ready.

        Returns:
            The URL of the server.

        Raises:
            EngineGone: The server ended, or was not ready in time.
        """
        deadline = time.monotonic() + self._start_timeout_s
        async with httpx.AsyncClient(timeout=5.0) as client:
            while time.monotonic() < deadline and self._process.poll() is None:
                found = URL.search(self._log.read_text(errors="replace"))
                if found is not None and await is_ready(client, found[1]):
                    return found[1]
                await asyncio.sleep(POLL_S)
        log_end = " ".join(self._log.read_text(errors="replace").split())[-400:]
        raise EngineGone(f"the server of task=load was not ready; {self._log} ends with: {log_end}")

    async def kill_ranks(self, url: str, every_s: float, for_s: float, seed: int) -> None:
        """Kill a random rank at regular intervals while requests are sent; ranks that are starting are spared.

        Args:
            url: The URL of the server.
            every_s: The interval between two kills, seconds; it is longer if ranks take longer to start.
            for_s: The time after which no rank is killed any more, seconds.
            seed: The seed for the choice of ranks.
        """
        choices, began = random.Random(seed), time.monotonic()
        async with httpx.AsyncClient(base_url=url, timeout=5.0) as client:
            while time.monotonic() + every_s < began + for_s:
                await asyncio.sleep(every_s)
                while not await is_ready(client):
                    await asyncio.sleep(POLL_S)
                if ranks := sorted(self.ranks().items()):
                    rank, pid = choices.choice(ranks)
                    os.kill(pid, signal.SIGKILL)
                    self.killed.append(RankKill(rank, pid, time.monotonic() - began))

    def ranks(self) -> dict[int, int]:
        """Return the process ids of the ranks, by rank."""
        return rank_processes(self._process.pid)

    async def watch_memory(self) -> None:
        """Sample the server's resident memory every second, without end."""
        while True:
            if (mib := resident_mib(self._process.pid)) is not None:
                self._samples.append((time.monotonic(), mib))
            await asyncio.sleep(SAMPLE_S)

    def stop(self) -> None:
        """End the server in order, then by force, and count its remaining processes; a second call does nothing."""
        if self._process.poll() is not None:
            return
        family = descendants(self._process.pid)
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        deadline = time.monotonic() + LEAK_S
        while (left := [pid for pid in family if command_line(pid)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.leaked = len(left)

    @property
    def chaos(self) -> Chaos:
        """The kills, and the number of processes that outlived the server."""
        return Chaos(len(self.killed), self.leaked, self.killed)

    @property
    def memory(self) -> MemoryGrowth | None:
        """The growth of the server's memory, or None with fewer than two samples."""
        return fit_memory_growth(self._samples)


async def is_ready(client: httpx.AsyncClient, url: str = "") -> bool:
    """Return whether a server reports that its ranks are ready."""
    with suppress(httpx.HTTPError):
        return (await client.get(f"{url}/ready")).is_success
    return False


def fit_memory_growth(samples: Sequence[tuple[float, float]]) -> MemoryGrowth | None:
    """Fit a line to the resident memory over time.

    Args:
        samples: Pairs of a time in seconds and the resident memory in MiB.

    Returns:
        The first and the last value and the slopes, or None with fewer than two samples.
    """
    if len(samples) < 2:
        return None
    at_s, mib = np.asarray(samples).T
    late = at_s >= at_s[0] + (at_s[-1] - at_s[0]) / 3
    late_slope = 60 * slope(at_s[late], mib[late]) if late.sum() > 1 else None
    return MemoryGrowth(len(samples), float(mib[0]), float(mib[-1]), 60 * slope(at_s, mib), late_slope)


def slope(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return the slope of a least-squares line."""
    return float(np.polyfit(x - x[0], y, 1)[0])


def descendants(pid: int) -> set[int]:
    """Return the ids of the living processes that a process has started, directly or indirectly."""
    parents = {int(entry.name): _parent(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    found: set[int] = set()
    fresh = {pid}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh}
        found |= fresh
    return found


def rank_processes(pid: int) -> dict[int, int]:
    """Return the process ids of the ranks that a process has started, directly or indirectly, by rank."""
    named = {found: RANK.fullmatch(process_name(found)) for found in descendants(pid)}
    return {int(match[1]): found for found, match in named.items() if match is not None}


def _parent(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def command_line(pid: int) -> bytes:
    """Return the command line of a process, empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def resident_mib(pid: int) -> float | None:
    """Return the resident memory of a process in MiB, or None if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
