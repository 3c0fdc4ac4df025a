"""A bound on the lines of a log that have one cause, so that a client cannot fill the disk with them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from harness.config.schema import LoggerConfig
from harness.loggers.level import LOG_FORMAT, set_log_level

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
        """Return whether to write a line; every handler of a line gets the same answer."""
        known = vars(record)
        if "within_limit" not in known:
            known["within_limit"] = self._count(record)
        return bool(known["within_limit"])

    def _count(self, record: logging.LogRecord) -> bool:
        """Return whether to write a new line, shortened and with the number of those that were left out."""
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


@contextmanager
def limited_logs(handler: logging.Handler, logger: LoggerConfig) -> Iterator[None]:
    """Write this process's logs with a handler, and bound the lines of every handler, while this context is active.

    Args:
        handler: The handler; it is closed at the end.
        logger: The configuration of the logs.
    """
    root, limit = logging.getLogger(), LogLimit()
    level, before = root.level, list(root.handlers)
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    root.addHandler(handler)
    for each in root.handlers:
        each.addFilter(limit)
    set_log_level(logger)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        for each in before:
            each.removeFilter(limit)
        handler.close()
