"""The configuration as it is written and read back: YAML in a run's folder, plain data in its record.

What reads one needs no Hydra, which ranks would import for nothing.
"""

from __future__ import annotations

from typing import Any

import msgspec
import yaml

from harness.config.schema import RunConfig


class ConfigError(ValueError):
    """A configuration that cannot run, with what to change in one line."""


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain data; enums by name."""
    plain: dict[str, Any] = msgspec.to_builtins(config)
    return plain


def from_yaml(text: str) -> RunConfig:
    """The configuration that `to_yaml` wrote; nothing in it is interpolated a second time."""
    return msgspec.convert(yaml.safe_load(text), RunConfig)
