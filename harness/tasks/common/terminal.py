"""The last words of a run on the terminal: one clear line and an exit status."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from harness.records.record import Status

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def print_error(error: object) -> None:
    """Print one clear line on standard error."""
    Console(stderr=True).print(f"[bold red]triptych:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)


def exit_status(status: Status) -> int:
    """Return the exit status of a command: 0 only if everything requested was done."""
    return {"ok": 0, "cancelled": EXIT_INTERRUPTED}.get(status.state, 1)
