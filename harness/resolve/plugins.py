"""Plug-ins of a configuration: what they add to it, and what may not go with them."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

import msgspec
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from harness.config.schema import RunConfig
from harness.config.yaml import ConfigError
from harness.plugins import full_name, load_plugins, loaded, options_of
from harness.resolve.names import FREE
from harness.resolve.plugin_rules import in_use
from models.registry import did_you_mean
from schedulers.registry import OURS, REGISTRIES, plugin_options, registrations

PROVIDER = "plug-in"  # of options in Hydra's store


def load_named_plugins(overrides: Sequence[str], compose: Callable[[list[str]], DictConfig]) -> None:
    """Load installed plug-ins, those of plugins=[...], and those that a file of the user's names.

    They may add what other overrides name, so this is done before any name is checked.

    Args:
        overrides: Overrides as on the command line, of a run or of all jobs of a sweep.
        compose: The function that composes one configuration.

    Raises:
        ConfigError: A plug-in cannot be loaded.
    """
    names: list[str] = []
    files: list[str] = []
    for override in _parsed(overrides):
        value = override.value()
        values = value.list if isinstance(value, ChoiceSweep) else [value]
        if override.key_or_group == "plugins":
            for one in values:
                names += [str(name) for name in (one if isinstance(one, list) else [one]) if name is not None]
        elif "." not in override.key_or_group and not override.is_range_sweep():
            files += [f"{override.key_or_group}={one}" for one in values if isinstance(one, str | QuotedString)]
    load_plugins(names)
    root = importlib.resources.files("conf")
    for choice in files:
        if not root.joinpath(f"{choice.replace('=', '/')}.yaml").is_file():  # none of ours names a plug-in
            composed = None
            with suppress(ConfigError):  # what is wrong with it is reported with the other overrides
                composed = compose([choice])
            if composed is not None:
                load_plugins(composed.plugins)


def _parsed(overrides: Sequence[str]) -> Iterator[Override]:
    """Yield the overrides that have a value; a malformed one is refused later."""
    for text in overrides:
        with suppress(HydraException):
            override = OverridesParser.create().parse_override(text)
            if not override.is_delete():
                yield override


def store_plugins() -> None:
    """Tell Hydra the keys of the loaded plug-ins and the options that they add to groups, and forget earlier ones."""
    store = ConfigStore.instance()
    _remove(store.repo)
    schema = OmegaConf.structured(RunConfig)
    for name in FREE:  # Hydra closes every other dictionary
        OmegaConf.set_struct(OmegaConf.select(schema, name), False)
    for name, options in plugin_options().items():
        schema.plugin[name] = OmegaConf.structured(options)
    store.store(name="schema", node=schema)
    for registry in REGISTRIES:
        for row in registry.registrations():
            if registry.group and row.owner != OURS:
                field = registry.key.rpartition(".")[2]
                store.store(group=registry.group, name=row.name, node={field: row.name}, provider=PROVIDER)


def _remove(nodes: dict[str, Any]) -> None:
    """Remove the options that plug-ins added, also below the groups of a group."""
    for name, node in list(nodes.items()):
        if isinstance(node, dict):
            _remove(node)
        elif node.provider == PROVIDER:
            del nodes[name]


def resolve_plugins(config: RunConfig) -> None:
    """Write into a configuration the plug-ins that it runs with, in place: those that it names, and installed ones.

    Options of other plug-ins, which earlier jobs of this process loaded, are left out.

    Raises:
        ValueError: The configuration uses what a plug-in registered that it does not name, or an option is unknown.
    """
    load_plugins(config.plugins)
    named = {full_name(name) for name in config.plugins}
    active = {name: plugin for name, plugin in loaded().items() if plugin.installed or name in named}
    plugin_of = {row.name: row.owner for row in registrations() if row.options is not None}
    for key, row in in_use(config):
        if row.owner not in (OURS, *active):
            raise ValueError(f"{key or row.kind}={row.name} is of the plug-in {row.owner}; add plugins=[{row.owner}]")
    for name, given in config.plugin.items():
        if name not in plugin_of:
            raise ValueError(f"plugin.{name}: no plug-in has options of that name{did_you_mean(name, plugin_of)}")
        if plugin_of[name] not in active and typed(name, given) != plugin_options()[name]():
            raise ValueError(f"plugin.{name} is of the plug-in {plugin_of[name]}; add plugins=[{plugin_of[name]}]")
    mine = [name for name, owner in plugin_of.items() if owner in active]
    config.plugins = list(active)
    config.plugin = {name: typed(name, config.plugin.get(name, {})) for name in mine}
    config.plugin_sources = {name: plugin.source for name, plugin in active.items()}


def typed(name: str, given: Any) -> Any:
    """Return the options of a registered name as its dataclass.

    Args:
        name: The name.
        given: What a configuration has of them: the dataclass, or a dictionary of a file.

    Raises:
        ValueError: There is no such option, or a type is wrong.
    """
    known = [declared.name for declared in fields(plugin_options()[name])]
    for key in given if isinstance(given, dict) else ():
        if key not in known:
            raise ValueError(f"unknown key 'plugin.{name}.{key}'{did_you_mean(str(key), known)}")
    try:
        return options_of({name: given}, name)
    except msgspec.ValidationError as error:
        raise ValueError(f"plugin.{name}: {error}") from error
