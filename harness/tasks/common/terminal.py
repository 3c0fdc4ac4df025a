"""The last words of a run on the terminal: one clear line and an exit status."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from harness.records.record import Status

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def output_console() -> Console:
    """Return the console of results: a terminal's width folds lines, a file or a pipe has them whole."""
    return Console(soft_wrap=not Console().is_terminal)


def print_error(error: object) -> None:
    """Print one clear line on standard error."""
    Console(stderr=True).print(f"[bold red]triptych:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)


class ReaderlessFile(io.FileIO):
    """A file descriptor whose reader may leave, as `head` does; what is written afterwards is dropped."""

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, and return the number of bytes that were taken."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """Let the command do its work and have its usual exit status, whoever reads its output until when."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or stream.isatty():
            continue
        stream.flush()
        raw = ReaderlessFile(stream.fileno(), "w", closefd=False)
        again = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, again)


def exit_status(status: Status) -> int:
    """Return the exit status of a command: 0 only if everything requested was done."""
    return {"ok": 0, "cancelled": EXIT_INTERRUPTED}.get(status.state, 1)
