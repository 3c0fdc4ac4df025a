"""The table of a search: the trials that no other one beats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.loggers.columns import add_numbers
from harness.records.search import FILE, Search


def print_search(search: Search, folder: Path, console: Console) -> None:
    """Print the front of a search.

    Args:
        search: The search.
        folder: The sweep's folder.
        console: Console for the table.
    """
    failed = sum(trial.measured.values is None for trial in search.trials)
    runs = len({trial.measured.folder for trial in search.trials})
    console.print(f"{len(search.trials)} trials with {runs} runs; {failed} trials have no values and are never best")
    if not search.front:
        reasons = dict.fromkeys(trial.measured.error or "" for trial in search.trials)
        console.print(f"there is no best trial: {escape('; '.join(reasons))}", soft_wrap=True)
        return
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("best trials")
    for key in search.space:
        table.add_column(escape(key), overflow="fold")
    add_numbers(table, [f"{name}, {way[:3]}" for name, way in zip(search.objectives, search.directions, strict=True)])
    for trial in search.best:
        values: Sequence[float] = trial.measured.values or ()
        shown = [escape(trial.params[key]) for key in search.space]
        table.add_row(str(trial.number), *shown, *(f"{value:.4g}" for value in values))
    console.print(table)
    console.print(f"search   {escape(str(folder / FILE))}", soft_wrap=True)
