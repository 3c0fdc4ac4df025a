"""The configuration as text and as plain data: YAML in a run's folder, a dictionary in its record.

Reading one needs no Hydra, which a rank would import for nothing.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import yaml

from harness.config.schema import RunConfig


class ConfigError(ValueError):
    """A configuration that cannot run, with one line that says what to change."""


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the resolved configuration as plain data; enums are given by name, infinity as a text: JSON has none."""
    plain: dict[str, Any] = _without_infinity(msgspec.to_builtins(config))
    return plain


def from_dict(plain: object) -> RunConfig:
    """Return the configuration of plain data that `to_dict` returned."""
    return msgspec.convert(plain, RunConfig, strict=False)


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_infinity(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def from_yaml(text: str) -> RunConfig:
    """Return the configuration that `to_yaml` wrote; nothing in it is interpolated a second time."""
    return from_dict(yaml.safe_load(text))
