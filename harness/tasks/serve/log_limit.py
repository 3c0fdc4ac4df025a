"""A bound on the lines of a log that have one cause, so that a client cannot fill the disk with them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_S = 60.0
MAX_LINES = 5  # of one cause in one window
MAX_CHARS = 4_000  # of one line without its traceback


@dataclass
class _Cause:
    began: float
    lines: int = 0


class LogLimit(logging.Filter):
    """A filter that passes MAX_LINES lines of one cause a minute; the next line says how many were left out.

    A cause is a place in the sources, with the type of its exception.

    Args:
        clock: A function that returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._causes: dict[tuple[object, ...], _Cause] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to write a line."""
        now, kind = self._clock(), record.exc_info[0] if record.exc_info else None
        cause = self._causes.setdefault((record.pathname, record.lineno, record.levelno, kind), _Cause(now))
        left_out = max(0, cause.lines - MAX_LINES)
        if now - cause.began >= WINDOW_S:
            cause.began, cause.lines = now, 0
        else:
            left_out = 0
        cause.lines += 1
        if cause.lines > MAX_LINES:
            return False
        message = record.getMessage()
        message = message if len(message) <= MAX_CHARS else f"{message[:MAX_CHARS]} ..."
        record.msg = f"{message} ({left_out} more in the last minute)" if left_out else message
        record.args = None
        return True


def limit_logs() -> None:
    """Bound the lines of every log of this process."""
    limit = LogLimit()
    for handler in logging.getLogger().handlers:
        handler.addFilter(limit)
