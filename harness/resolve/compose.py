"""From overrides to one checked configuration: names, types, then combinations, each refused in one line.

Everything here runs before a process starts and without importing torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config.schema import RunConfig
from harness.config.yaml import ConfigError as ConfigError
from harness.config.yaml import from_yaml as from_yaml
from harness.config.yaml import to_dict as to_dict
from harness.config.yaml import to_yaml as to_yaml
from harness.plugins import load_plugins, loaded
from harness.resolve.comparison import quote_overrides
from harness.resolve.folder_name import folder_name
from harness.resolve.names import check_names, one_line
from harness.resolve.plugins import load_named_plugins, store_plugins
from harness.resolve.rules import resolve_config
from harness.resolve.run import ResolvedRun as ResolvedRun


def register_schema() -> None:
    """Tell Hydra the types of every key and how a sweep names a job's folder; safe to repeat."""
    if not OmegaConf.has_resolver("folder_name"):
        OmegaConf.register_new_resolver("folder_name", _job_folder_name)
        ConfigStore.instance().store(name="schema", node=RunConfig)
    if loaded() or ConfigStore.instance().load("schema.yaml").node.plugin:
        store_plugins()


def compose_run(overrides: Sequence[str]) -> ResolvedRun:
    """Compose one run, fill in the model's defaults and check it.

    Args:
        overrides: Overrides as on the command line, without Hydra's own flags.

    Returns:
        The resolved run.

    Raises:
        ConfigError: A group, option or key is unknown, a type is wrong, or the combination cannot run.
    """
    overrides = [quote_overrides(override) for override in overrides]
    load_plugins_of(overrides)
    check_names(overrides)
    composed = _composed(overrides)
    if load_plugins(composed.plugins):  # a file names them
        composed = _composed(overrides)
    config, notes = check_composed(composed)
    return ResolvedRun(config, list(overrides), Path(str(composed.hydra.run.dir)), notes)


def _composed(overrides: Sequence[str]) -> DictConfig:
    register_schema()
    try:
        with _hydra():
            composed = compose("config", list(overrides), return_hydra_config=True)
            str(composed.hydra.run.dir)  # interpolates the folder's name
            return composed
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error


def load_plugins_of(overrides: Sequence[str]) -> None:
    """Load the plug-ins that a command line or a file that it chooses names, as `load_named_plugins`."""
    load_named_plugins(overrides, _composed)


@contextmanager
def _hydra() -> Iterator[None]:
    """Run Hydra on conf/ inside the context; also inside a job of a sweep, whose state is restored at the end."""
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_module("conf", version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


def _job_folder_name(_root_: DictConfig) -> str:
    """Return the folder's name of the job that Hydra is composing, from its overrides as they were written."""
    overrides = OmegaConf.to_container(_root_.hydra.overrides.task, resolve=False)
    return folder_name([str(override) for override in overrides or ()])


def named_folder(overrides: Sequence[str]) -> Path | None:
    """Return the run's folder that overrides name themselves, even if the rest of them cannot be composed."""
    if not any(override.startswith("hydra.run.dir=") for override in overrides):
        return None
    try:
        return Path(str(_hydra_settings(overrides).run.dir))
    except (HydraException, OmegaConfBaseException):
        return None


def sweep_folder(overrides: Sequence[str]) -> Path:
    """Return the folder of a sweep with these overrides."""
    return Path(str(_hydra_settings(overrides).sweep.dir))


def _hydra_settings(overrides: Sequence[str]) -> DictConfig:
    """Return Hydra's own node, with the folders that these overrides give."""
    register_schema()
    own = [override for override in overrides if override.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
    with _hydra():
        settings: DictConfig = compose("config", own, return_hydra_config=True).hydra
        return settings


def check_composed(composed: DictConfig) -> tuple[RunConfig, list[str]]:
    """Convert what Hydra composed to dataclasses, fill in the model's defaults and check the combination.

    Args:
        composed: Hydra's configuration, with the schema's types.

    Returns:
        The configuration and the warnings.

    Raises:
        ConfigError: A type is wrong, or the combination cannot run.
    """
    if OmegaConf.get_type(composed) is not RunConfig:
        raise ConfigError("the configuration is not a RunConfig; keep `- schema` first in conf/config.yaml's defaults")
    try:
        config = RunConfig(**{f.name: _plain(composed, f.name) for f in fields(RunConfig)})
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from error
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            resolve_config(config)
        except (ValueError, OSError) as error:
            raise ConfigError(one_line(error)) from error
    return config, [str(w.message) for w in caught if w.category is UserWarning]


def _plain(composed: DictConfig, name: str) -> Any:
    """Return one group of the composed configuration as its dataclass."""
    value = composed[name]
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
