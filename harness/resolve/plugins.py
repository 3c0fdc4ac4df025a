"""Plug-ins of a configuration: what they add to it, and what may not go with them."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from harness.config.schema import RunConfig
from harness.config.tasks import TRAITS
from harness.plugins import full_name, loaded
from harness.resolve.checkpoint_defaults import PUBLISHED_FAMILY
from schedulers.registry import AXES, OURS, REGISTRIES, Registration, plugin_options


def store_plugins() -> None:
    """Tell Hydra the keys of the loaded plug-ins, and the options that they add to groups."""
    schema = OmegaConf.structured(RunConfig)
    for name, options in plugin_options().items():
        schema.plugin[name] = OmegaConf.structured(options)
    store = ConfigStore.instance()
    store.store(name="schema", node=schema)
    for registry in REGISTRIES:
        for row in registry.registrations():
            if registry.group and row.owner != OURS:
                field = registry.key.rpartition(".")[2]
                store.store(group=registry.group, name=row.name, node={field: row.name}, provider=row.owner)


def resolve_plugins(config: RunConfig) -> None:
    """Write into a configuration the plug-ins that it runs with, in place: those that it names, and installed ones.

    Options of other plug-ins, which earlier jobs of this process loaded, are left out.

    Raises:
        ValueError: The configuration uses what a plug-in registered that it does not name.
    """
    named = {full_name(name) for name in config.plugins}
    active = {name: plugin for name, plugin in loaded().items() if plugin.installed or name in named}
    for key, row in in_use(config):
        if row.owner != OURS and row.owner not in active:
            raise ValueError(f"{key or row.kind}={row.name} is of the plug-in {row.owner}; add plugins=[{row.owner}]")
    owners = {row.name: row.owner for registry in REGISTRIES for row in registry.registrations() if row.options}
    config.plugins = list(active)
    config.plugin = {name: given for name, given in config.plugin.items() if owners.get(name) in active}
    config.plugin_sources = {name: plugin.source for name, plugin in active.items()}


def in_use(config: RunConfig) -> Iterator[tuple[str, Registration]]:
    """Yield what a configuration uses of each registry, with the key that names it; all of a registry without a key."""
    for registry in REGISTRIES:
        if registry.key.startswith("scheduler.") and config.scheduler.family == PUBLISHED_FAMILY:
            continue  # the checkpoint's own noise scheduler
        chosen = attrgetter(registry.key)(config) if registry.key else registry.names()
        for name in [chosen] if isinstance(chosen, str) else chosen or ():
            if name in registry:
                yield registry.key, registry.registration(name)


def check_plugins(config: RunConfig) -> None:
    """Refuse a layout, or step batching, that something in use is registered not to run with.

    Raises:
        ValueError: One line says what does not go together, and what to use instead.
    """
    batches = TRAITS[config.task.name].serves and config.serve.max_batch > 1
    for key, row in in_use(config):
        name = f"{key or row.kind}={row.name}"
        for axis in AXES:
            degree = getattr(config.parallel, axis)
            if row.layouts is not None and axis not in row.layouts and degree > 1:
                allowed = f"parallel.{', parallel.'.join(row.layouts)}" if row.layouts else "parallel=single"
                raise ValueError(f"{name} does not go with parallel.{axis}={degree}; use {allowed}")
        if batches and not row.step_batching:
            raise ValueError(
                f"{name} does not go with serve.max_batch={config.serve.max_batch}: requests cannot share its "
                "forwards; set serve.max_batch=1"
            )
