"""A server of task=serve as a child process: started, watched, its ranks killed on purpose, and ended."""

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

from harness.engines.environment import OWNER, import_path
from harness.metrics.load import Chaos, MemoryGrowth
from harness.serving.transport import EngineGone

RANKS = b"harness.engines.rank"  # in their command line
ADDRESS = re.compile(r" on (http://\S+),")
SAMPLE_S = 1.0
POLL_S = 0.2
STOP_S = 60.0
LEAK_S = 5.0  # until processes of a server that has ended are gone


class Server:
    """A server that this process has started. Use it as a context manager: on leaving, it has ended.

    Args:
        overrides: of its run.
        folder: of its run.
        start_timeout_s: until it is ready.
    """

    def __init__(self, overrides: Sequence[str], folder: Path, start_timeout_s: float) -> None:
        self.leaked = 0
        self.kills = 0
        self._samples: list[tuple[float, float]] = []
        self._log = folder.with_name("server.log")
        self._start_timeout_s = start_timeout_s
        own = ["task=serve", "serve.port=0", f"hydra.run.dir={folder}", "compare.a=null", "compare.b=null"]
        environment = os.environ | {
            "PYTHONPATH": import_path(os.environ.get("PYTHONPATH")),
            "PYTHONUNBUFFERED": "1",
            OWNER: str(os.getpid()),
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness", *overrides, *own],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    async def ready(self) -> str:
        """Its address, once its ranks are warm.

        Raises:
            EngineGone: it ended, or was not ready in time.
        """
        deadline = time.monotonic() + self._start_timeout_s
        async with httpx.AsyncClient(timeout=5.0) as client:
            while time.monotonic() < deadline and self._process.poll() is None:
                found = ADDRESS.search(self._log.read_text(errors="replace"))
                if found is not None and await is_ready(client, found[1]):
                    return found[1]
                await asyncio.sleep(POLL_S)
        said = " ".join(self._log.read_text(errors="replace").split())[-400:]
        raise EngineGone(f"the server of task=load was not ready; {self._log} ends with: {said}")

    async def kill_ranks(self, url: str, every_s: float, for_s: float, seed: int) -> None:
        """Kills one of its ranks, drawn by seed, every so often while requests are sent; ranks that start are let be.

        Args:
            url: of the server.
            every_s: between two kills; more where ranks take longer to start.
            for_s: how long.
            seed: of the draws.
        """
        draw, until = random.Random(seed), time.monotonic() + for_s
        async with httpx.AsyncClient(base_url=url, timeout=5.0) as client:
            while time.monotonic() + every_s < until:
                await asyncio.sleep(every_s)
                while not await is_ready(client):
                    await asyncio.sleep(POLL_S)
                ranks = sorted(pid for pid in descendants(self._process.pid) if RANKS in command_line(pid))
                os.kill(draw.choice(ranks), signal.SIGKILL)
                self.kills += 1

    async def watch_memory(self) -> None:
        """Reads its resident memory every second; without end."""
        while True:
            if (mib := resident_mib(self._process.pid)) is not None:
                self._samples.append((time.monotonic(), mib))
            await asyncio.sleep(SAMPLE_S)

    def stop(self) -> None:
        """Ends it in order, then by force, and counts what of it lives on. Harmless when repeated."""
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
        """What was done to it."""
        return Chaos(self.kills, self.leaked)

    @property
    def memory(self) -> MemoryGrowth | None:
        """How its memory grew; None where it was read less than twice."""
        return memory(self._samples)


async def is_ready(client: httpx.AsyncClient, url: str = "") -> bool:
    """Whether a server says that its ranks are warm."""
    with suppress(httpx.HTTPError):
        return (await client.get(f"{url}/ready")).is_success
    return False


def memory(samples: Sequence[tuple[float, float]]) -> MemoryGrowth | None:
    """Resident memory over time, from pairs of seconds and MiB; None of less than two."""
    if len(samples) < 2:
        return None
    at_s, mib = np.asarray(samples).T
    slope = float(np.polyfit(at_s - at_s[0], mib, 1)[0])
    return MemoryGrowth(len(samples), float(mib[0]), float(mib[-1]), 60 * slope)


def descendants(pid: int) -> set[int]:
    """The living processes that a process has started, and those that these have."""
    parents = {int(entry.name): _parent(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    found: set[int] = set()
    fresh = {pid}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh}
        found |= fresh
    return found


def _parent(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def command_line(pid: int) -> bytes:
    """A process's command line; empty of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def resident_mib(pid: int) -> float | None:
    """A process's resident memory; None of one that has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
