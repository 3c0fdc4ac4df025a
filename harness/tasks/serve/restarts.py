"""When dead ranks are replaced, whether memory killed them, and a log that one cause does not fill."""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from harness.config.serve import ServeConfig
from harness.serving.faults import failure_line

log = logging.getLogger(__name__)
LONGEST_PAUSE_S = 60.0
QUIET_S = 60.0  # a cause is logged once in this time


def pause_after(times: int) -> float:
    """Return the pause after the n-th failure in a row: 1, 2, 4 ... 60 s."""
    return float(min(LONGEST_PAUSE_S, 2 ** min(times - 1, 6)))


class Deaths:
    """The deaths of ranks within serve.restart_window_s.

    A death that one request explains says nothing about the ranks, and is taken back. So no request spends the
    restarts. A machine on which every request dies looks the same, so after `serve.restarts` such requests without an
    image between them, deaths count again.

    Args:
        serve: The server's configuration.
        clock: The clock, seconds.
    """

    def __init__(self, serve: ServeConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._serve = serve
        self._clock = clock
        self._times: deque[float] = deque(maxlen=serve.restarts + 8)
        self._explained = 0

    def add(self) -> None:
        """Count a death."""
        self._times.append(self._clock())

    @property
    def pause_s(self) -> float:
        """The pause before the next ranks, seconds; 0 while there are not more deaths than allowed."""
        while self._times and self._clock() - self._times[0] > self._serve.restart_window_s:
            self._times.popleft()
        excess = len(self._times) - self._serve.restarts
        return pause_after(excess) if excess > 0 else 0.0

    def explain(self, times: int) -> None:
        """Take back the latest deaths: a request was found that kills ranks.

        Args:
            times: How many deaths the request explains.
        """
        self._explained += 1
        if self._explained <= self._serve.restarts:
            for _ in range(min(times, len(self._times))):
                self._times.pop()

    def on_image(self) -> None:
        """Record that the ranks have generated something: they work."""
        self._explained = 0


class TroubleLog:
    """A log of the server's own troubles, with one line for each cause in QUIET_S.

    Args:
        clock: The clock, seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._logged: dict[tuple[str, str], float] = {}

    def add(self, what: str, error: Exception) -> None:
        """Log a trouble unless the same one was logged a short time ago.

        Args:
            what: What the server was doing.
            error: The trouble.
        """
        cause, now = (what, f"{type(error).__name__} {getattr(error, 'errno', '')}"), self._clock()
        if now - self._logged.get(cause, -QUIET_S) < QUIET_S:
            return
        self._logged[cause] = now
        log.warning("%s: %s", what, failure_line(error), exc_info=not isinstance(error, OSError))


def oom_kills() -> tuple[int, ...]:
    """Return how many processes the kernel has killed for memory: in this control group, and on the machine."""
    found = []
    for file in (*_memory_files(), Path("/proc/vmstat")):
        try:
            count = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
        except OSError:
            continue
        found.append(0 if count is None else int(count[1]))
    return tuple(found)


def _memory_files() -> list[Path]:
    """Return the files in which the control group of this process counts, in version 2 and in version 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups = {kind: path.lstrip("/") for _, kind, path in (line.split(":", 2) for line in lines)}
    root = Path("/sys/fs/cgroup")
    files = [root / groups[""] / "memory.events"] if "" in groups else []
    return files + ([root / "memory" / groups["memory"] / "memory.oom_control"] if "memory" in groups else [])
