"""A tree of runs as one pandas table: a row for each run, or for each repeat, stage, solver step or image."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import msgspec

from harness.records.long import LONG_ROWS
from harness.records.record import OF_USER, Status, declared
from harness.records.shards import merge_complete
from harness.records.tree import TreeRun, read_runs

if TYPE_CHECKING:
    import pandas

Long: TypeAlias = Literal["repeats", "stages", "steps", "images"]
IDENTITY = ("folder", "sweep", "job", "state", "error", "started_at", "wandb_id")
"""The columns that every table begins with."""
MEASURED = (*("first_call", "summary", "quality", "pretrained", "metrics", "fidelity", "load", "dataset", "rerun"),)
"""The parts of a record that hold what was measured."""
DECLARED = ("engine", "attention", "config", "provenance")
"""The parts of a record that say what was measured, and where."""
LISTS = ("repeats", "samples", "notes", "loaded", "beside")
"""The parts of a record that are lists; repeats and samples have tables of their own, see `load`."""
INTERVALS = ("ci95", "range")
"""Names of pairs, which become two columns: `ci95_low` and `ci95_high`."""
ALWAYS_DIFFERENT = ("provenance.started", "provenance.ended", "provenance.command")
MISSING: Any = object()


def load(path: str | Path, varying: bool = False, long: Long | None = None) -> pandas.DataFrame:
    """Read a tree of runs as a table, one row per run, failed ones too; nested keys become dotted columns.

    The first columns say which run a row is: `folder`, `sweep`, `job`, `state`, `error`, `started_at`, `wandb_id`. An
    interval such as `summary.latency_ms.ci95` is two columns, with `_low` and `_high` at the end.

    The shards of a data set are one row, once all of them have ended well. A performance dump of SGLang-Diffusion is a
    row of the engine `sglang (dump)`; `folder` is its file.

    A long table has its own columns after those that say which run a row is, and those of the configuration that differ
    between the runs. Runs without a record have no rows in it, and shards are not merged.

    Args:
        path: A run's folder, a sweep's, any folder above them, or the file of a dump.
        varying: Whether to leave out the keys of the configuration that are the same in all runs, what was measured in
            none, and lists.
        long: What a row is, if it is no run: `repeats`, `stages`, `steps` or `images`.

    Returns:
        The table.

    Raises:
        RunFolderError: The path does not exist, or a file of images cannot be read.
        ValueError: `long` has another value.
    """
    if long is not None and long not in get_args(Long):
        raise ValueError(f"long={long!r} is none of {', '.join(get_args(Long))}")
    runs = read_runs(Path(path))
    if long is not None:
        return _long_table(runs, long)
    runs = _merge_shards(runs)
    rows = [wide_row(run) for run in runs]
    table = to_frame(rows)
    if not varying:
        return table[by_part(table.columns)]
    parts = _prefixes(MEASURED)
    measured = [name for name in by_part(table.columns) if name.startswith(parts) and _is_known(rows, name)]
    names = (*IDENTITY, "fingerprint", *varying_columns(runs, rows), *measured)
    return table[[name for name in names if name in table]]


def wide_row(run: TreeRun) -> dict[str, Any]:
    """Return the row of one run: its identity, what was measured, what was declared, and lists."""
    row = run.identity | {"overrides": run.overrides}
    if run.record is not None:
        nested = msgspec.to_builtins(run.record)
        lists = {name: nested[name] for name in LISTS}
        row["fingerprint"] = run.record.fingerprint
    elif run.dump is not None:
        nested, lists = run.dump.parts, {"repeats": [run.dump.repeat]}
    else:
        nested, lists = {}, {}
    nested = {**nested, "config": run.config}
    for name in (*MEASURED, *DECLARED):
        if nested.get(name) is not None:
            row |= flatten(nested[name], f"{name}.", INTERVALS if name in MEASURED else ())
    return row | lists


def flatten(value: Mapping[str, Any], prefix: str = "", pairs: Sequence[str] = ()) -> dict[str, Any]:
    """Return nested dictionaries as one with dotted keys.

    Args:
        value: The nested dictionaries; an empty one has no key.
        prefix: Beginning of every key.
        pairs: Names of keys that hold two numbers or None, and become two keys.

    Returns:
        The values by dotted key.
    """
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            found |= flatten(item, f"{prefix}{name}.", pairs)
        elif name in pairs:
            low, high = item or (None, None)
            found |= {f"{prefix}{name}_low": low, f"{prefix}{name}_high": high}
        else:
            found[f"{prefix}{name}"] = item
    return found


def by_part(names: Iterable[str]) -> list[str]:
    """Return names with those of one part of a record together: what was measured, what was declared, lists."""
    parts = {part: number for number, part in enumerate((*MEASURED, *DECLARED, *LISTS), start=1)}
    return sorted(names, key=lambda name: parts.get(name.partition(".")[0], 0))


def varying_columns(runs: Sequence[TreeRun], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns of what was declared whose values differ between runs.

    Left out are keys that change neither an image nor a time, but for the user's own; times; and the command line.

    Args:
        runs: The runs.
        rows: Their wide rows.

    Returns:
        The columns, in the order of the rows.
    """
    counted = {f"config.{key}" for run in runs for key in flatten(declared(run.config) if run.config else {})}
    own = tuple(f"config.{name}" for name in OF_USER)
    found = []
    for name in _names(rows):
        if not name.startswith(_prefixes(DECLARED)) or name in ALWAYS_DIFFERENT:
            continue
        if name.startswith("config.") and name not in counted and not name.startswith(own):
            continue
        values = {json.dumps(row[name], sort_keys=True, default=str) for row in rows if name in row}
        if len(values) > 1:
            found.append(name)
    return found


def to_frame(rows: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """Return rows of runs as a table that begins with the columns of their identity."""
    columns = to_columns([dict.fromkeys(IDENTITY), *rows])
    return to_types({name: values[1:] for name, values in columns.items()})


def to_types(columns: Mapping[str, list[Any]]) -> pandas.DataFrame:
    """Return columns as a table; truth values and numbers of jobs may be missing, and times have a time zone."""
    import pandas

    frame = pandas.DataFrame(columns)
    truths = [name for name, values in columns.items() if {bool} == {type(value) for value in values} - {type(None)}]
    frame = frame.astype(dict.fromkeys(truths, "boolean"))
    if "job" in frame:
        times = pandas.to_datetime(frame["started_at"].astype(object), utc=True, format="ISO8601", errors="coerce")
        frame = frame.assign(job=frame["job"].astype("Int64"), started_at=times)
    return frame


def to_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return rows as columns, each with values of one type; a value that a row does not have is None."""
    return {name: one_type([row.get(name) for row in rows]) for name in _names(rows)}


def one_type(values: list[Any]) -> list[Any]:
    """Return values of one type: infinity, which a configuration has as text, is a number; other mixtures are text."""
    kinds = {_kind(value) for value in values if value is not None}
    if kinds == {"text", "number"} and all(value in ("inf", "-inf") for value in values if isinstance(value, str)):
        return [float(value) if isinstance(value, str) else value for value in values]
    if len(kinds) > 1:
        return [value if value is None or isinstance(value, str) else to_text(value) for value in values]
    return values


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else "nested"


def to_text(value: object) -> str:
    """Return a value as JSON, where a text alone is itself."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _merge_shards(runs: Sequence[TreeRun]) -> list[TreeRun]:
    """Return the runs with the shards of each data set as one, once all of them have ended well."""
    by_folder = {run.folder: run for run in runs}
    good = {run.folder: run.record for run in runs if run.record is not None and run.status.state == "ok"}
    for merged in merge_complete(good):
        first = by_folder[merged.folders[0]]
        by_folder[first.folder] = replace(first, status=Status("ok"), record=merged.record)
        for folder in merged.folders[1:]:
            del by_folder[folder]
    return [*by_folder.values()]


def _long_table(runs: Sequence[TreeRun], long: Long) -> pandas.DataFrame:
    wide = [wide_row(run) for run in runs]
    same = (*IDENTITY, *varying_columns(runs, wide))
    rows = []
    for run, row in zip(runs, wide, strict=True):
        shared = {name: row.get(name) for name in same}
        rows += [shared | own for own in LONG_ROWS[long](run)]
    return to_frame(rows)


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _prefixes(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{part}." for part in parts)


def _is_known(rows: Iterable[Mapping[str, Any]], name: str) -> bool:
    """Return whether any row has a single value in a column."""
    values = (row.get(name) for row in rows)
    return any(value is not None and not isinstance(value, list) and not _is_nan(value) for value in values)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
