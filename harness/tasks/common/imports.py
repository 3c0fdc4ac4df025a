"""Imports that a run needs at its end, made while it waits for its ranks."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from harness.config.schema import RunConfig
from harness.loggers.wandb import resolve_mode


def modules_for_saving(config: RunConfig) -> list[str]:
    """Return the modules that saving the images and logging the run will import."""
    mirrored = resolve_mode(config.logger.wandb.mode) != "disabled"
    return ["PIL.ImageDraw", "PIL.ImageFont", "PIL.PngImagePlugin", *(["wandb"] if mirrored else [])]


@contextmanager
def import_in_background(names: Sequence[str]) -> Iterator[None]:
    """Import modules in a thread while the block waits for other processes, so that nothing waits for them later.

    The thread has finished when the block is left, before anything is timed. A module that cannot be imported raises
    its error where it is used.

    Args:
        names: Modules to import.
    """

    def work() -> None:
        for name in names:
            with suppress(ImportError):
                importlib.import_module(name)

    thread = threading.Thread(target=work, name="imports")
    thread.start()
    try:
        yield
    finally:
        thread.join()
