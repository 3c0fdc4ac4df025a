"""What a server keeps on its disk, and whether the disk takes anything.

A full disk is found before a request finds it. What is kept has a size and an age, and the oldest goes first.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harness.config.serve import ServeConfig
from harness.records.record import cannot_be_written
from harness.serving.faults import failure_line
from harness.tasks.serve.restarts import TroubleLog

PROBE = ".disk"
PROBE_BYTES = 1 << 16
MAX_LOG_BYTES = 8 << 20  # of a log that is still being written; then its older half goes


@dataclass(frozen=True)
class Kept:
    """Files that go together: those of one request, or the logs of dead ranks.

    Attributes:
        name: The request's id, or the name of the folder of logs.
        paths: The files, or the folder.
        since: The time since when they are kept, a value of `time.monotonic()`.
        size: Their size, bytes.
    """

    name: str
    paths: tuple[Path, ...]
    since: float
    size: int


class Housekeeping:
    """The files of a server: serve.keep_mib and serve.keep_hours hold, and a small write says how the disk is.

    Args:
        serve: The server's configuration.
        folder: The run's folder.
        clock: The clock of ages, seconds.

    Attributes:
        trouble: Why the disk takes nothing, in one line; empty if it does.
        restore: The function that makes the folder again if somebody has removed it.
    """

    CHECK_S = 3.0

    def __init__(
        self,
        serve: ServeConfig,
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.trouble = ""
        self.restore: Callable[[], None] = lambda: None
        self._max_bytes = serve.keep_mib << 20
        self._max_age_s = 3600.0 * serve.keep_hours
        self._folder = folder
        self._clock = clock
        self._kept: dict[str, Kept] = {}  # the oldest first
        self._kept_bytes = 0
        self._lock = threading.Lock()
        self._troubles = TroubleLog()

    async def run(self) -> None:
        """Check again and again; it never ends by itself."""
        while True:
            try:
                await asyncio.to_thread(self.check)
            except Exception as error:
                self._troubles.add("housekeeping", error)
            await asyncio.sleep(self.CHECK_S)

    def check(self) -> None:
        """Restore the folder, remove what is too much or too old, and see whether the disk takes a file."""
        trouble = ""
        try:
            self.restore()
            self._add_dead_logs()
            self._shorten_logs()
            self.trim()
            self._probe()
        except OSError as error:
            trouble = cannot_be_written(self._folder, error).partition("; ")[0] + "; free some disk space"
            self._troubles.add("writing to the run's folder", error)
        except Exception as error:
            trouble = failure_line(error)
            self._troubles.add("restoring the run's folder", error)
        self.trouble = trouble

    def keep(self, name: str, paths: Sequence[Path]) -> None:
        """Take files into the books, and remove the oldest ones if they are too much now.

        Args:
            name: The request's id.
            paths: The files of the request.
        """
        self._add(Kept(name, tuple(paths), self._clock(), sum(map(disk_bytes, paths))))
        self.trim()

    def drop(self, name: str) -> None:
        """Remove files that are kept; nothing happens if there are none."""
        with self._lock:
            kept = self._pop(name)
        if kept is not None:
            remove(kept.paths)

    def trim(self) -> None:
        """Remove the oldest files until the rest is small enough and young enough."""
        with self._lock:
            room = self._max_bytes - sum(disk_bytes(path) for path in self._live_logs())
            gone: list[Kept] = []
            while self._kept:
                oldest = next(iter(self._kept.values()))
                is_too_much = self._kept_bytes > room and len(self._kept) > 1  # somebody waits for the newest
                if not is_too_much and self._clock() - oldest.since <= self._max_age_s:
                    break
                self._pop(oldest.name)
                gone.append(oldest)
        for kept in gone:
            remove(kept.paths)

    def _add(self, kept: Kept) -> None:
        with self._lock:
            self._kept[kept.name] = kept
            self._kept_bytes += kept.size

    def _pop(self, name: str) -> Kept | None:
        """Take files out of the books; the caller holds the lock."""
        kept = self._kept.pop(name, None)
        self._kept_bytes -= 0 if kept is None else kept.size
        return kept

    def _add_dead_logs(self) -> None:
        for folder in sorted((self._folder / "logs").glob("died*"), key=modified_at):
            if folder.name not in self._kept:
                self._add(Kept(folder.name, (folder,), self._clock(), sum(map(disk_bytes, folder.rglob("*")))))

    def _live_logs(self) -> list[Path]:
        return [path for path in (*self._folder.glob("requests*.jsonl"), *(self._folder / "logs").glob("*.log"))]

    def _shorten_logs(self) -> None:
        """Cut the older half of logs that are still being written; who writes them appends."""
        paths = list((self._folder / "logs").glob("*.log"))
        limit = min(MAX_LOG_BYTES, self._max_bytes // (4 * max(1, len(paths))))  # a quarter of the space for all
        for path in paths:
            if disk_bytes(path) > limit:
                with suppress(FileNotFoundError), path.open("rb+") as file:  # of ranks that have just died
                    file.seek(-limit // 2, os.SEEK_END)
                    end = file.read()
                    file.seek(0)
                    file.write(end)
                    file.truncate()

    def _probe(self) -> None:
        path = self._folder / PROBE
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            left = memoryview(bytes(PROBE_BYTES))
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)  # some file systems report a full disk or quota only here
        finally:
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()


def disk_bytes(path: Path) -> int:
    """Return the space that a file takes on the disk, 0 if there is none."""
    try:
        return 512 * path.stat().st_blocks
    except OSError:
        return 0


def modified_at(path: Path) -> float:
    """Return the time of the last change, seconds since 1970; 0 if there is no such file any more."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def remove(paths: Sequence[Path]) -> None:
    """Remove files and folders; a missing one is no error."""
    for path in paths:
        with suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
