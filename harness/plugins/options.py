"""The options of a plug-in in a configuration, as the dataclass that it registered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import msgspec

from schedulers.registry import Registry, plugin_options


def options_of(plugin: Mapping[str, Any], name: str) -> Any:
    """Return the options of a registered name.

    Args:
        plugin: The `plugin` group, as composed or as read from a run's config.yaml.
        name: The registered name.

    Returns:
        An instance of the dataclass that was registered with the name, with defaults where the group has nothing.

    Raises:
        KeyError: The name was registered without options.
    """
    return msgspec.convert(msgspec.to_builtins(plugin.get(name, {})), plugin_options()[name], strict=False)


def arguments_of(plugin: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the options of a registered name as arguments of what it makes; none if it has no options."""
    if name not in plugin_options():
        return {}
    options = options_of(plugin, name)
    return {declared.name: getattr(options, declared.name) for declared in fields(options)}


def own_options(registry: Registry[Any], name: str, plugin: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a name of one kind as arguments of what it makes; none if it has none."""
    return {} if registry.registration(name).options is None else arguments_of(plugin, name)
