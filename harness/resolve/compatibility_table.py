"""The pages' tables of what goes together, generated from harness.resolve.conflicts.

`make pages` writes them: the short one into README.md, the whole one into conf/README.md.
"""

from __future__ import annotations

import copy
import importlib.resources
import re
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from harness.config.schema import ModelConfig, RunConfig
from harness.resolve.conflicts import BY_NAME, CONFLICTS, Conflict, refusal
from harness.resolve.engines_table import BASELINES
from models.registry import ARCHITECTURES

ROOT = Path(__file__).parents[2]
MARKS = ("<!-- compatibility -->", "<!-- /compatibility -->")
ROWS = {
    "tensor parallelism (`tp`)": ("tp",),
    "ring attention, Ulysses": ("ring", "ulysses"),
    "displaced patches": ("displaced",),
    "PipeFusion (`pipe`)": ("pipe",),
    "sharded weights": ("shard_weights",),
    "block caches": ("block_cache",),
    "`cache=teacache`": ("teacache",),
    "guidance caches": ("guidance_cache",),
    "`eager`": ("eager",),
    "`compile`": ("compile",),
    "8-bit linears": ("quantized",),
    "offloaded networks": ("offload",),
    "step batching": ("step_batching",),
}
"""The short table's rows, with their features."""
COLUMNS = {
    "transformers": (),
    "U-Nets": ("unet",),
    "diffusers": ("baseline",),
    "cache_dit": ("cache_dit",),
    "sglang": ("sglang",),
}
OTHERS = {"`attention=sdpa`": ("without_lse",)}
"""What the last column of the short table names besides the rows above."""


def with_settings(config: RunConfig, settings: tuple[str, ...]) -> RunConfig:
    """Return a copy of a configuration with settings such as `engine=diffusers` and `parallel.tp=2`.

    An option of a group sets the keys that its file in conf/ sets. Nothing is filled in or checked.

    Args:
        config: The configuration, unchanged.
        settings: Overrides of features.

    Returns:
        The copy.
    """
    found, conf = copy.deepcopy(config), Path(str(importlib.resources.files("conf")))
    for setting in settings:
        key, _, value = setting.partition("=")
        path = key.replace("/", ".")
        option = conf / key / f"{value}.yaml"
        given = yaml.safe_load(option.read_text()) if option.is_file() else {"": yaml.safe_load(value)}
        for name, content in given.items():
            _set(found, f"{path}.{name}" if name else path, content)
    return found


def _set(config: RunConfig, path: str, value: Any) -> None:
    """Set one key of a configuration; sections and lists of an option's file are left aside."""
    *parents, name = path.split(".")
    node: Any = config
    for parent in parents:
        node = getattr(node, parent)
    old = getattr(node, name, None)
    if isinstance(value, dict | list) or not hasattr(node, name):
        return
    setattr(node, name, type(old)[value] if isinstance(old, Enum) else value)


def pair(first: str, second: str) -> tuple[str, ...] | None:
    """Return settings that use two features, or None if one excludes the other by its meaning."""
    one, other = BY_NAME[first], BY_NAME[second]
    for settings in ((*one.example, *other.example), (*other.example, *one.example)):
        found = with_settings(RunConfig(), settings)
        if one.used(found) and other.used(found):
            return settings
    return None


def goes_with(first: str, second: str) -> bool:
    """Return whether two features may be used together."""
    both = pair(first, second)
    return both is None or refusal(with_settings(RunConfig(), both)) is None


def runs(first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    """Return whether every feature of a group may be used with every feature of another."""
    return all(goes_with(a, b) for a in first for b in second)


def short_table() -> str:
    """Return the table for the README: features by kinds of networks and engines, and what excludes what."""
    lines = [f"| | {' | '.join(COLUMNS)} | not with |", f"|---{'|---' * len(COLUMNS)}|---|"]
    above: dict[str, tuple[str, ...]] = dict(OTHERS)
    for label, features in ROWS.items():
        cells = ["yes" if runs(features, column) else "no" for column in COLUMNS.values()]
        excluded = [other for other, names in above.items() if not runs(features, names)]
        lines.append(f"| {label} | {' | '.join(cells)} | {', '.join(excluded)} |")
        above[label.partition(" (")[0]] = features
    return "\n".join(lines)


def whole_table() -> str:
    """Return the tables for conf/README.md: every pair that is refused, and which architecture runs with what."""
    lines = ["| this | does not go with | because | instead |", "|---|---|---|---|"]
    lines += [_row(conflict, other) for conflict in CONFLICTS for other in conflict.with_what]
    engines = {name: (name,) for name in ("cache_dit", "sglang")}
    features = {label: names for label, names in ROWS.items() if label != "offloaded networks"}
    columns = {**features, "diffusers": ("baseline",), **engines}
    lines += ["", f"| architecture | {' | '.join(columns)} | schedulers and attention of baseline engines |"]
    lines += [f"|---{'|---' * len(columns)}|---|"]
    for name in ARCHITECTURES:
        cells = ["yes" if all(_on(name, feature) for feature in column) else "no" for column in columns.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {_baseline_choices(name)} |")
    return "\n".join(lines)


def _row(conflict: Conflict, other: str) -> str:
    cells = (_named(conflict.when), _named(other), conflict.because, conflict.instead)
    return f"| {' | '.join(cells).replace('{ranks}', 'N')} |"


def _named(name: str) -> str:
    """Return a feature's label, with an example if it does not name its key."""
    feature = BY_NAME[name]
    return feature.label if "=" in feature.label else f"{feature.label} (`{feature.example[-1]}`)"


def _on(architecture: str, feature: str) -> bool:
    """Return whether an architecture runs with a feature."""
    found = with_settings(RunConfig(), BY_NAME[feature].example)
    found.model = ModelConfig(
        architecture=architecture,
        offload=found.model.offload,
        quantize=found.model.quantize,
        text=found.model.text,
    )
    return refusal(found) is None


def _baseline_choices(architecture: str) -> str:
    row = BASELINES.get(architecture)
    if row is None:
        return ""
    return f"{', '.join(row.families or ('all',))}; {', '.join(row.attention)}"


def with_text(page: Path, text: str, marks: tuple[str, str] = MARKS) -> str:
    """Return a page with the text between its marks replaced.

    Args:
        page: Markdown file.
        text: What comes between the marks.
        marks: The comments before and after it.

    Returns:
        The whole page.

    Raises:
        ValueError: The page lacks a mark.
    """
    content = page.read_text()
    found = re.search(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", content, re.DOTALL)
    if found is None:
        raise ValueError(f"{page} has no {marks[0]} and {marks[1]} to write between")
    return content[: found.start()] + f"{marks[0]}\n\n{text}\n\n{marks[1]}" + content[found.end() :]


def pages() -> dict[Path, str]:
    """Return the pages that hold the tables, with their content."""
    tables = {ROOT / "README.md": short_table(), ROOT / "conf" / "README.md": whole_table()}
    return {page: with_text(page, text) for page, text in tables.items()}


if __name__ == "__main__":
    for page, content in pages().items():
        page.write_text(content)
