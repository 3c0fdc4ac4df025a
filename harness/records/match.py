"""Two trees of runs side by side: the runs of one configuration are matched, and their latencies compared.

Use it for two sweeps that were run at different times, such as before and after a change. The runs of the two sides are
not measured in alternation, so that a drift of the machine is in the ratio. task=compare avoids that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

from harness.metrics.summary import FEWEST, LEVEL
from harness.metrics.unpaired import median_ratio
from harness.records.record import declared
from harness.records.table import flatten, load, to_columns, to_types

if TYPE_CHECKING:
    import pandas

Runs: TypeAlias = "str | Path | pandas.DataFrame"
CONFIG = "config."
LATENCY = "summary.latency_ms.median"
MACHINE = (
    *("provenance.hardware.cpu", "provenance.cpu.capability", "provenance.hardware.device"),
    "provenance.world_size",
)
NEEDED = ("folder", "state", "repeats")
SHOWN = 8  # keys in an error


@dataclass(frozen=True)
class SideRun:
    """One run of a side.

    Attributes:
        folder: The run's folder.
        state: How it ended.
        keys: What it is matched by.
        times_ms: Latencies of its repeats, ms; none if it did not end well.
        median_ms: Median latency, ms; None if it has none.
        machine: Processor, instruction set, device and number of ranks.
        code: Hash of the sources.
    """

    folder: str
    state: str
    keys: dict[str, Any]
    times_ms: list[float]
    median_ms: float | None
    machine: tuple[Any, ...]
    code: Any

    @property
    def match(self) -> str:
        """The values of the keys as one text; the folder if none is known, which matches nothing else."""
        is_known = any(value is not None for value in self.keys.values())
        return json.dumps(self.keys, sort_keys=True, default=str) if is_known else self.folder


def compare(a: Runs, b: Runs, on: Sequence[str] | None = None, ignore: Sequence[str] = ()) -> pandas.DataFrame:
    """Match the runs of two trees by their configuration, and return the ratios of their latencies.

    Two runs match if all keys that can change an image or a time are equal: those that the fingerprint is of. `ratio`
    is the median latency of A over that of B, as in task=compare: above 1, B is faster.

    Its interval is the bootstrap over the repeats of both. Its level allows for the number of matches (Bonferroni), so
    that two equal sweeps have a row that `differs` once in twenty times. Several runs of one configuration on a side
    are sampled as runs. Of one run, the interval does not hold what changes from run to run.

    Args:
        a: The baseline: a folder, or a table of `load` (with its lists, so not a varying one), perhaps of some rows.
        b: The candidate.
        on: Keys that are equal in a match, in place of all: keys of the configuration, or other columns of `load`.
        ignore: Keys or groups of keys that differ on purpose, such as `engine` or `attention.backend`.

    Returns:
        One row per configuration: the keys that differ between rows; `match`, which is both, a or b; the ratio with its
        interval; whether it `differs`, missing where a side has fewer than 4 repeats; and what both sides are.

    Raises:
        ValueError: No configuration is in both, a key is in neither, or a table has no repeats.
    """
    sides = [_table(each) for each in (a, b)]
    runs = [[_side_run(row, on, ignore) for row in _rows(side)] for side in sides]
    if on is None and ignore:
        _check_ignored(ignore, sides)
    if on is not None:
        _check_on(on, runs)
    groups: list[dict[str, list[SideRun]]] = [{}, {}]
    for group, side in zip(groups, runs, strict=True):
        for run in side:
            group.setdefault(run.match, []).append(run)
    if not groups[0].keys() & groups[1].keys():
        raise ValueError(_no_match(*runs))
    return _frame(*groups)


def _table(side: Runs) -> pandas.DataFrame:
    if isinstance(side, str | Path):
        return load(side)
    if missing := [name for name in NEEDED if name not in side]:
        raise ValueError(f"a table without {missing[0]} cannot be compared; give load(path), neither varying nor long")
    return side


def _rows(table: pandas.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table, without what is missing in each."""
    import pandas

    def is_known(value: Any) -> bool:
        return isinstance(value, list | tuple | dict | str) or not pandas.isna(value)

    rows = table.astype(object).to_dict("records")
    return [{str(name): value for name, value in row.items() if is_known(value)} for row in rows]


def _side_run(row: Mapping[str, Any], on: Sequence[str] | None, ignore: Sequence[str]) -> SideRun:
    times = [float(repeat["total_duration_ms"]) for repeat in row.get("repeats", ())] if row["state"] == "ok" else []
    middle = median(times) if times else row.get(LATENCY) if row["state"] == "ok" else None
    return SideRun(
        folder=str(row["folder"]),
        state=str(row["state"]),
        keys=_declared_keys(row, ignore) if on is None else {key: _plain(_value(row, key)) for key in on},
        times_ms=times,
        median_ms=middle,
        machine=tuple(row.get(name) for name in MACHINE),
        code=row.get("provenance.sources_sha256"),
    )


def _declared_keys(row: Mapping[str, Any], ignore: Sequence[str]) -> dict[str, Any]:
    """Return the keys that can change an image or a time, with their values."""
    nested: dict[str, Any] = {}
    for name, value in row.items():
        if name.startswith(CONFIG):
            *groups, last = name.removeprefix(CONFIG).split(".")
            place = nested
            for group in groups:
                place = place.setdefault(group, {})
            place[last] = value
    found = flatten(declared(nested)).items()
    return {key: _plain(value) for key, value in found if not _is_below(key, ignore)}


def _is_below(key: str, groups: Iterable[str]) -> bool:
    names = (group.removeprefix(CONFIG) for group in groups)
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _value(row: Mapping[str, Any], key: str) -> Any:
    return row.get(f"{CONFIG}{key}", row.get(key))


def _plain(value: Any) -> Any:
    """Return a value in one form: a column with missing numbers holds integers as floats, and infinity may be text."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else str(value) if math.isinf(value) else value
    return value


def _check_ignored(ignore: Sequence[str], sides: Sequence[pandas.DataFrame]) -> None:
    names = [str(name).removeprefix(CONFIG) for side in sides for name in side if str(name).startswith(CONFIG)]
    for group in ignore:
        if not any(_is_below(name, [group]) for name in names):
            raise ValueError(
                f"ignore={group!r} is no key of the configurations; give a key such as scheduler.solver.name"
            )


def _check_on(on: Sequence[str], runs: Sequence[Sequence[SideRun]]) -> None:
    for key in on:
        if all(run.keys[key] is None for side in runs for run in side):
            raise ValueError(f"on={key!r} is no column of the tables; give a key such as scheduler.solver.name")


def _no_match(a: Sequence[SideRun], b: Sequence[SideRun]) -> str:
    """Return why nothing matches: the keys that have no value in common."""
    if not a or not b:
        return f"there are {len(a)} runs in a and {len(b)} in b; give two trees of runs"
    found = []
    for key in dict.fromkeys(key for run in (*a, *b) for key in run.keys):
        values = [{json.dumps(run.keys.get(key), default=str) for run in side} for side in (a, b)]
        if not values[0] & values[1]:
            found.append(key)
    if not found:
        return "no configuration is in both; give on=[...] with the keys that a match has in common"
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return (
        f"no configuration is in both: all runs differ in {', '.join(found[:SHOWN])}{more}; "
        "ignore=[...] leaves out keys that differ on purpose"
    )


def _frame(a: dict[str, list[SideRun]], b: dict[str, list[SideRun]]) -> pandas.DataFrame:
    matches = {match: (a.get(match, []), b.get(match, [])) for match in dict.fromkeys([*a, *b])}
    keys = [(sides[0] or sides[1])[0].keys for sides in matches.values()]
    comparisons = sum(min(map(_count, sides)) >= FEWEST for sides in matches.values())
    level = 1 - (1 - LEVEL) / max(1, comparisons)
    rows = [
        {f"{CONFIG}{name}": own.get(name) for name in _varying(keys)} | _row(*sides, level)
        for own, sides in zip(keys, matches.values(), strict=True)
    ]
    return to_types(to_columns(rows))


def _varying(keys: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for each in keys for name in each)
    return [name for name in names if len({json.dumps(each.get(name), default=str) for each in keys}) > 1]


def _count(side: Sequence[SideRun]) -> int:
    return sum(len(run.times_ms) for run in side)


def _row(a: Sequence[SideRun], b: Sequence[SideRun], level: float) -> dict[str, Any]:
    """Return the columns of one configuration."""
    sides = {"a": a, "b": b}
    middle = {name: _median(side) for name, side in sides.items()}
    ratio, interval = None, None
    if middle["a"] is not None and middle["b"] is not None:
        ratio = middle["a"] / middle["b"]
    if _count(a) and _count(b):
        times = {name: [run.times_ms for run in side if run.times_ms] for name, side in sides.items()}
        ratio, interval = median_ratio(times["a"], times["b"], level)
    low, high = interval or (None, None)
    row: dict[str, Any] = {
        "match": "both" if a and b else "a" if a else "b",
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "level": None if interval is None else level,
        "differs": None if interval is None else not interval[0] <= 1 <= interval[1],
    }
    row |= {f"{name}_ms": middle[name] for name in sides}
    row |= {f"repeats_{name}": _count(side) for name, side in sides.items()}
    row |= {f"state_{name}": ", ".join(dict.fromkeys(run.state for run in side)) for name, side in sides.items()}
    row["same_machine"] = _same([run.machine for run in a], [run.machine for run in b])
    row["same_code"] = _same([(run.code,) for run in a], [(run.code,) for run in b])
    return row | {f"folders_{name}": [run.folder for run in side] for name, side in sides.items()}


def _same(a: Sequence[tuple[Any, ...]], b: Sequence[tuple[Any, ...]]) -> bool | None:
    """Return whether all runs have the same values; None if a side has no run, or a value is not known."""
    if not a or not b or any(value in (None, "") for values in (*a, *b) for value in values):
        return None
    return len({*a, *b}) == 1


def _median(side: Sequence[SideRun]) -> float | None:
    """Return the median latency of the repeats, or of runs that have no repeats but a median; None without any."""
    times = [time for run in side for time in run.times_ms]
    times = times or [run.median_ms for run in side if run.median_ms is not None]
    return median(times) if times else None
