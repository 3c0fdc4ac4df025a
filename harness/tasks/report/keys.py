"""Which configuration keys tell the runs of a tree apart, and a short name for each run, made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from harness.config.cache import CACHE_KEYS, CacheConfig, fill_defaults
from harness.parallel.mesh import AXES
from harness.tasks.report.sweep import flat

Cell = str | float | None
LEADS = ("model.name", "scheduler.family", "scheduler.solver.name")
FOLLOWERS = ("model.", "scheduler.")  # groups of which most keys follow from the three names
ASIDE = ("logger", "train", "compare", "report", "plan")  # change neither a picture nor a time
NAME_LETTERS = 32  # of a value in a run's name
NAMES = ("name", "family", "backend")  # last parts of keys whose value says enough


def cells(config: Mapping[str, object]) -> dict[str, Cell]:
    """A resolved configuration as dotted keys with values to show; the layout is one of them, and the cache."""
    kept = {key: value for key, value in config.items() if key not in ASIDE}
    if isinstance(layout := kept.get("parallel"), Mapping):
        kept["parallel"] = layout_name(layout)
    if isinstance(cache := kept.get("cache"), Mapping):
        kept["cache"] = cache_name(cache)
    return {key: _cell(value) for key, value in flat(kept).items()}


def layout_name(degrees: Mapping[str, object]) -> str:
    """Such as `cfg2 ulysses2`; `single` for one rank."""
    counts = (*AXES, "pipe", "patches", "warmup")
    names = [f"{name}{degrees[name]}" for name in counts if degrees.get(name) not in (None, 1)]
    return " ".join([*names, *["displaced"] * (degrees.get("displaced") is True)]) or "single"


def cache_name(cache: Mapping[str, object]) -> str:
    """Such as `first_block threshold=0.2`: what it is, and its first key with those that are not its defaults."""
    name = str(cache["name"])
    plain = CacheConfig(name)
    fill_defaults(plain)
    keys = [key for key in CACHE_KEYS[name] if key != "coefficients" and cache[key] is not None]
    said = [
        f"{key}={_cell(cache[key])}" for key in keys if key == CACHE_KEYS[name][0] or cache[key] != getattr(plain, key)
    ]
    return " ".join([name, *said])


def varying(rows: Sequence[Mapping[str, Cell]], overridden: Collection[str]) -> list[str]:
    """The keys that differ between rows, the three leading names first.

    Keys of the model and the noise scheduler that follow from those names are left out, unless an override named them.

    Args:
        rows: a configuration each, by `cells`.
        overridden: keys that the overrides of any row name.
    """
    names = dict.fromkeys([*LEADS, *(key for row in rows for key in row)])
    leads = [tuple(row.get(lead) for lead in LEADS) for row in rows]
    kept = []
    for name in names:
        column = [row.get(name) for row in rows]
        if len(set(column)) < 2:
            continue
        follows = len(set(leads)) == len(set(zip(leads, column, strict=True)))
        if name in LEADS or name in overridden or not (follows and name.startswith(FOLLOWERS)):
            kept.append(name)
    return kept


def labels(rows: Sequence[Mapping[str, Cell]], keys: Sequence[str], folders: Sequence[str]) -> list[str]:
    """A short and different name for every run: its values that not most runs have, and its folder where they do not
    tell it apart.
    """
    counts = {key: Counter(row[key] for row in rows if key in row) for key in keys}
    own = [[key for key in keys if key in row and 2 * counts[key][row[key]] <= counts[key].total()] for row in rows]
    short = [
        " ".join(_named(key, row[key]) for key in kept) or folder
        for row, kept, folder in zip(rows, own, folders, strict=True)
    ]
    return [
        name if short.count(name) == 1 else f"{name} ({folder})" for name, folder in zip(short, folders, strict=True)
    ]


def _named(key: str, value: Cell) -> str:
    last = key.rpartition(".")[2]
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    shown = shown if len(shown) <= NAME_LETTERS else f"{shown[: NAME_LETTERS - 1]}…"
    return shown if last in NAMES or key in ("parallel", "cache") else f"{last}={shown}"


def _cell(value: object) -> Cell:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, int | float | str):
        return value
    return ", ".join(str(part) for part in value) if isinstance(value, list) else str(value)
