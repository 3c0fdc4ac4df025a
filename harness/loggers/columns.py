"""Tables of several jobs: a column for each key whose value differs between them, and no name that is cut."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from harness.records.job import JobResult

WHOLE = 24  # letters up to which a value is never folded: the longest name of a layout has 17
MOST = 10_000  # letters of a line
WIDEST = 40  # letters of a column in a file, beyond which a value is folded


def varying_values(jobs: Sequence[JobResult]) -> dict[str, list[str]]:
    """Return the keys whose values differ between jobs, in the order of the command line.

    Args:
        jobs: The jobs of one sweep.

    Returns:
        The value of each job by key; empty for a job that leaves the key as it is.
    """
    rows = [dict(split_override(override) for override in job.overrides) for job in jobs]
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [row.get(key, "") for row in rows] for key in keys}
    return {key: values for key, values in columns.items() if len(set(values)) > 1}


def add_job_columns(table: Table, jobs: Sequence[JobResult]) -> list[list[str]]:
    """Add a column for each key that varies; one with the folders' names if none does.

    Args:
        table: The table, without rows.
        jobs: The jobs of one sweep.

    Returns:
        The cells of each job, as markup.
    """
    columns = varying_values(jobs)
    heads = short_names(columns)
    if not columns:
        heads, columns = {"job": "job"}, {"job": [job.folder.name for job in jobs]}
    for key, values in columns.items():
        longest = max(map(len, values))
        table.add_column(heads[key], overflow="fold", no_wrap=longest <= WHOLE, max_width=max(WIDEST, len(heads[key])))
    return [[escape(values[number]) for values in columns.values()] for number in range(len(jobs))]


def add_numbers(table: Table, headings: Sequence[str]) -> None:
    """Add columns of numbers, which are never folded; a heading may have several lines."""
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)


def print_table(table: Table, console: Console, spare: Sequence[str] = ()) -> None:
    """Print a table of which no name and no number is cut.

    In a file or a pipe it is as wide as it needs to be. On a narrow terminal columns are left out, as a line below
    says; what is still too wide is wrapped by the terminal.

    Args:
        table: The table; only its columns of long texts may be folded.
        console: The console.
        spare: Headings of columns that may be left out, the first one first.
    """
    width = console.width
    left_out: list[str] = []
    for heading in spare:
        if console.is_terminal and _measure(table, console).maximum > width:
            kept = (column for column in table.columns if column.header != heading)
            table.columns = [replace(column, _index=number) for number, column in enumerate(kept)]
            left_out.append(" ".join(heading.split()))
    wanted = _measure(table, console)
    try:
        console.width = max(width, wanted.minimum if console.is_terminal else wanted.maximum)
        console.print(table)
    finally:
        console.width = width
    if left_out:
        console.print(f"not shown in {width} columns: {', '.join(left_out)}", highlight=False)


def _measure(table: Table, console: Console) -> Measurement:
    return Measurement.get(console, console.options.update(max_width=MOST), table)


def split_override(override: str) -> tuple[str, str]:
    """Return the key and the value of an override; the key has no sign, and a text no quotes."""
    key, _, value = override.partition("=")
    quoted = re.fullmatch(r"""(["'])(.*)\1""", value, re.DOTALL)
    return key.lstrip("+"), quoted.group(2) if quoted else value


def short_names(keys: Sequence[str] | dict[str, list[str]]) -> dict[str, str]:
    """Return the last part of each key, or the whole key if two of them have the same last part."""
    last = {key: re.split(r"[./]", key)[-1] for key in keys}
    counts = Counter(last.values())
    return {key: name if counts[name] == 1 else key for key, name in last.items()}
