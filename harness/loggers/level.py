"""The level of a process's logs."""

from __future__ import annotations

import logging

from harness.config.schema import LoggerConfig, LogLevel

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_log_level(logger: LoggerConfig) -> None:
    """Log no line below logger.level in this process, whichever handlers it has."""
    logging.getLogger().setLevel(logger.level.name.upper())


def log_to_terminal(logger: LoggerConfig) -> None:
    """Set the level of the command's own logs, which go to standard error.

    Without logger.level=debug only warnings and errors are shown: Python does that where no handler is set.
    """
    if logger.level is LogLevel.debug:
        logging.basicConfig(format=LOG_FORMAT)
    set_log_level(logger)
