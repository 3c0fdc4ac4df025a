"""The configuration of a wandb run: the groups and keys that its task reads, and where the record comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import msgspec

from harness.config.schema import RunConfig, Task
from harness.records.record import Record
from schedulers.options import option_of

TASKS = frozenset(f"task={task.name}" for task in Task)


def record_config(record: Record) -> dict[str, Any]:
    """Return what wandb shows as the configuration of a recorded run: its keys in use, overrides and provenance."""
    origin = {"overrides": record.overrides, "provenance": msgspec.to_builtins(record.provenance)}
    return {**used_config(record.config), "fingerprint": record.fingerprint, **origin}


def used_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the groups and keys that have no effect in it, as their declarations say.

    Keys that are null are left out too, and what a checkpoint says for other families.

    Args:
        config: The configuration as plain data. One that names no task is returned whole.

    Returns:
        The part in use; keys that no dataclass declares are kept.
    """
    if not isinstance(config.get("task"), Mapping):
        return dict(config)
    return _used(config, RunConfig(), config)


def own_tags(declared: Mapping[str, object]) -> list[str]:
    """Return the tags of a configuration; none if it is known in part."""
    tags = declared.get("tags")
    return [str(tag) for tag in tags] if isinstance(tags, list) else []


def _used(values: Mapping[str, Any], node: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of one group that are in use; `node` is the group's dataclass, `config` the whole."""
    declared = {field.name: (option_of(field).reads, getattr(node, field.name)) for field in fields(node)}
    kept = {}
    for key, value in values.items():
        reads, default = declared.get(key, ((), None))
        if value is None or not _is_read(reads, config):
            continue
        if is_dataclass(default) and isinstance(value, Mapping):
            value = _used(value, default, config)
        if key == "checkpoint_defaults":
            family = config["scheduler"]["family"]
            value = {name: _set(row) for name, row in value.items() if name == family}
        if value != {}:
            kept[key] = value
    return kept


def _set(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that are not null."""
    return {key: value for key, value in row.items() if value is not None}


def _is_read(reads: tuple[str, ...], config: Mapping[str, Any]) -> bool:
    """Return whether a key with these choices has an effect; a choice that is no KEY=VALUE counts as taken."""
    tasks = [choice for choice in reads if choice in TASKS]
    others = [choice for choice in reads if choice not in TASKS]
    return all(not part or any(_is_taken(choice, config) for choice in part) for part in (tasks, others))


def _is_taken(choice: str, config: Mapping[str, Any]) -> bool:
    key, equals, wanted = choice.partition("=")
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        value = value.get("name")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return not equals or " " in key or text == wanted
