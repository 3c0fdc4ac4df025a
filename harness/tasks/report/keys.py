"""The configuration keys that differ between the runs of a tree, and a short label for each run made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from harness.config.cache import CacheConfig, cache_keys, fill_defaults
from harness.parallel.mesh import AXES
from harness.tasks.report.sweep import flatten

Cell = str | float | None
LEADING = ("model.name", "scheduler.family", "scheduler.solver.name")
DEPENDENT_GROUPS = ("model.", "scheduler.")  # groups whose keys mostly follow from the three names
IGNORED = ("logger", "train", "compare", "report", "plan")  # keys that change neither an image nor a time
LABEL_LETTERS = 32  # longest value in a run's label
SELF_EXPLANATORY = ("name", "family", "backend")  # last parts of keys whose value is clear without the key


def cells(config: Mapping[str, object]) -> dict[str, Cell]:
    """Flatten a resolved configuration to dotted keys and values to show; the layout is one value, and so is the cache.

    Args:
        config: The resolved configuration as nested mappings.

    Returns:
        The values by dotted key.
    """
    shown = {key: value for key, value in config.items() if key not in IGNORED}
    if isinstance(layout := shown.get("parallel"), Mapping):
        shown["parallel"] = layout_name(layout)
    if isinstance(cache := shown.get("cache"), Mapping):
        shown["cache"] = cache_name(cache)
    return {key: _cell(value) for key, value in flatten(shown).items()}


def layout_name(degrees: Mapping[str, object]) -> str:
    """Return a short name of a layout, such as `cfg2 ulysses2`; `single` for one rank."""
    counts = (*AXES, "pipe", "patches", "warmup")
    names = [f"{name}{degrees[name]}" for name in counts if degrees.get(name) not in (None, 1)]
    return " ".join([*names, *["displaced"] * (degrees.get("displaced") is True)]) or "single"


def cache_name(cache: Mapping[str, object]) -> str:
    """Return a short name of a cache, such as `first_block threshold=0.2`.

    Args:
        cache: The resolved group `cache`.

    Returns:
        The cache's name with its first key, and with every other key that is not at its default.
    """
    name = str(cache["name"])
    defaults = CacheConfig(name)
    fill_defaults(defaults)
    used = cache_keys(name)
    keys = [key for key in used if key != "coefficients" and cache[key] is not None]
    values = [f"{key}={_cell(cache[key])}" for key in keys if key == used[0] or cache[key] != getattr(defaults, key)]
    return " ".join([name, *values])


def varying_keys(rows: Sequence[Mapping[str, Cell]], overridden: Collection[str]) -> list[str]:
    """Return the keys that differ between rows, the three leading names first.

    Keys of the model and the noise scheduler that follow from those names are left out, unless an override named them.

    Args:
        rows: Configurations, from `cells`.
        overridden: Keys that the overrides of any row name.

    Returns:
        The keys that differ.
    """
    names = dict.fromkeys([*LEADING, *(key for row in rows for key in row)])
    leading = [tuple(row.get(lead) for lead in LEADING) for row in rows]
    found = []
    for name in names:
        column = [row.get(name) for row in rows]
        if len(set(column)) < 2:
            continue
        follows = len(set(leading)) == len(set(zip(leading, column, strict=True)))
        if name in LEADING or name in overridden or not (follows and name.startswith(DEPENDENT_GROUPS)):
            found.append(name)
    return found


def run_labels(rows: Sequence[Mapping[str, Cell]], keys: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Return a short and unique label for every run.

    A label has the run's values that at most half of the runs share. If that is not unique, the run's folder follows.

    Args:
        rows: Configurations, from `cells`.
        keys: The keys that differ between rows.
        folders: Name of each run's folder.

    Returns:
        One label per run.
    """
    counts = {key: Counter(row[key] for row in rows if key in row) for key in keys}
    own = [[key for key in keys if key in row and 2 * counts[key][row[key]] <= counts[key].total()] for row in rows]
    short = [
        " ".join(_label_part(key, row[key]) for key in distinguishing) or folder
        for row, distinguishing, folder in zip(rows, own, folders, strict=True)
    ]
    return [
        name if short.count(name) == 1 else f"{name} ({folder})" for name, folder in zip(short, folders, strict=True)
    ]


def _label_part(key: str, value: Cell) -> str:
    last = key.rpartition(".")[2]
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    shown = shown if len(shown) <= LABEL_LETTERS else f"{shown[: LABEL_LETTERS - 1]}…"
    return shown if last in SELF_EXPLANATORY or key in ("parallel", "cache") else f"{last}={shown}"


def _cell(value: object) -> Cell:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, int | float | str):
        return value
    return ", ".join(str(part) for part in value) if isinstance(value, list) else str(value)
