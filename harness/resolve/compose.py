"""From overrides to one checked configuration: names, types, then combinations, each refused in one line.

Everything here runs before a process starts and without importing torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from hydra.types import RunMode
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
from harness.resolve.own_files import FAILURES, explain
from harness.resolve.plugins import load_named_plugins, store_plugins
from harness.resolve.rules import resolve_config
from harness.resolve.run import ResolvedRun as ResolvedRun
from harness.resolve.search_path import SearchPath, conf_root


def register_schema() -> None:
    """Tell Hydra the types of every key and how a sweep names a job's folder; safe to repeat."""
    if not OmegaConf.has_resolver("folder_name"):
        OmegaConf.register_new_resolver("folder_name", _job_folder_name)
        store_plugins()
    elif loaded() or ConfigStore.instance().load("schema.yaml").node.plugin:
        store_plugins()


def compose_run(overrides: Sequence[str], search: SearchPath | None = None) -> ResolvedRun:
    """Compose one run, fill in the model's defaults and check it.

    Args:
        overrides: Overrides as on the command line, without Hydra's own flags.
        search: Search path of the configurations. None is conf/ and the folders of TRIPTYCH_CONF.

    Returns:
        The resolved run.

    Raises:
        ConfigError: A group, option or key is unknown, a type is wrong, or the combination cannot run.
    """
    search = SearchPath.of_user() if search is None else search
    overrides = [quote_overrides(override) for override in overrides]
    load_plugins_of(overrides, search)
    composed, folder = _compose(overrides, search, RunMode.RUN)
    if load_plugins(composed.plugins):  # a file names them
        composed, folder = _compose(overrides, search, RunMode.RUN)
    if composed.hydra.mode is RunMode.MULTIRUN:
        raise ConfigError("hydra.mode=MULTIRUN runs one job for each choice; leave it out and add -m")
    config, notes = check_composed(composed)
    return ResolvedRun(config, list(overrides), folder, [*notes, *_sweep_notes(composed)], search=search)


def _sweep_notes(composed: DictConfig) -> list[str]:
    """Return a note if Hydra's own node asks for what only a sweep does."""
    settings = composed.hydra
    requested = {"callbacks": settings.callbacks, "job.env_set": settings.job.env_set, "job.chdir": settings.job.chdir}
    names = [f"hydra.{name}" for name, value in requested.items() if value]
    return [f"{' and '.join(names)} has an effect in a sweep alone; add -m"] if names else []


def load_plugins_of(overrides: Sequence[str], search: SearchPath) -> None:
    """Load the plug-ins that a command line or a file that it chooses names, as `load_named_plugins`."""
    load_named_plugins(overrides, lambda choice: _compose(choice, search, RunMode.RUN)[0])


def _compose(overrides: Sequence[str], search: SearchPath, mode: RunMode) -> tuple[DictConfig, Path]:
    """Return what Hydra composes, with its own node, and the folder of the run or of the sweep.

    Raises:
        ConfigError: A name is unknown, or Hydra cannot compose what was given.
    """
    try:
        check_names(overrides, mode is RunMode.MULTIRUN, search)
        register_schema()
        with search.hydra() as hydra:
            composed: DictConfig = hydra.compose_config(
                search.primary, list(overrides), mode, with_log_configuration=False, from_shell=False
            )
            folder = composed.hydra.run.dir if mode is RunMode.RUN else composed.hydra.sweep.dir
            return composed, Path(str(folder))
    except FAILURES as error:
        raise ConfigError(explain(error, _known_roots(search, overrides))) from error


def _known_roots(search: SearchPath, overrides: Sequence[str]) -> list[Path]:
    """Return the folders of configurations; those of the command alone if the primary one cannot be read."""
    with suppress(*FAILURES, ConfigError):
        return search.roots(overrides)
    return [conf_root(), *(Path(folder) for folder in search.folders)]


def _job_folder_name(_root_: DictConfig) -> str:
    """Return the folder's name of the job that Hydra is composing, from its overrides as they were written."""
    overrides = OmegaConf.to_container(_root_.hydra.overrides.task, resolve=False)
    return folder_name([str(override) for override in overrides or ()])


def named_folder(overrides: Sequence[str]) -> Path | None:
    """Return the run's folder that overrides name themselves, even if the rest of them cannot be composed."""
    own = [override for override in overrides if override.startswith("hydra.run.dir=")]
    if not own:
        return None
    register_schema()
    try:
        with SearchPath().hydra():
            return Path(str(compose("config", own, return_hydra_config=True).hydra.run.dir))
    except (HydraException, OmegaConfBaseException):
        return None


def compose_sweep(overrides: Sequence[str], search: SearchPath) -> tuple[Path, str]:
    """Return the folder of a sweep with these overrides, and the class of its sweeper.

    Args:
        overrides: The overrides of the sweep.
        search: Search path of the configurations.

    Raises:
        ConfigError: A name is unknown, or Hydra cannot compose what was given.
    """
    composed, folder = _compose(overrides, search, RunMode.MULTIRUN)
    return folder, str(composed.hydra.sweeper._target_)


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
