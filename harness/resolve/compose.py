"""From overrides to one checked configuration: names, types, then combinations, each refused in one line.

Everything here runs before a process starts and without importing torch.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
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
from harness.resolve.comparison import quote_overrides
from harness.resolve.names import check_names, one_line
from harness.resolve.rules import resolve_config

MAX_NAME_BYTES = 160


@dataclass(frozen=True)
class ResolvedRun:
    """A checked configuration, what the user wrote to get it, and the folder that Hydra gives the run."""

    config: RunConfig
    overrides: list[str]
    folder: Path
    notes: list[str]


def register_schema() -> None:
    """Tells Hydra the types of every key, and how a sweep names a job's folder. Harmless when repeated."""
    if not OmegaConf.has_resolver("folder_name"):
        OmegaConf.register_new_resolver("folder_name", folder_name)
        ConfigStore.instance().store(name="schema", node=RunConfig)


def compose_run(overrides: Sequence[str]) -> ResolvedRun:
    """Composes, fills in the model's defaults and checks one run.

    Args:
        overrides: as on the command line, without Hydra's own flags.

    Raises:
        ConfigError: an unknown group, option or key, a wrong type, or a combination that cannot run.
    """
    overrides = [quote_overrides(override) for override in overrides]
    check_names(overrides)
    register_schema()
    try:
        with _hydra():
            composed = compose("config", list(overrides), return_hydra_config=True)
            folder = Path(str(composed.hydra.run.dir))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    config, notes = check_composed(composed)
    return ResolvedRun(config, list(overrides), folder, notes)


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra on conf/ while it lasts; also inside a job of its own sweep, whose state is put back."""
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_module("conf", version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


def folder_name(overrides: str) -> str:
    """A job's overrides as one folder's name: no slashes, and never longer than a file system allows."""
    name = overrides.replace("/", ".")
    if len(name.encode()) <= MAX_NAME_BYTES:
        return name
    return f"{name.encode()[:MAX_NAME_BYTES].decode(errors='ignore')}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def run_folder(overrides: Sequence[str]) -> Path:
    """The folder that a run with these overrides has, also where the rest of them cannot be composed."""
    return Path(str(_own_settings(overrides).run.dir))


def sweep_folder(overrides: Sequence[str]) -> Path:
    """The folder that a sweep with these overrides has."""
    return Path(str(_own_settings(overrides).sweep.dir))


def _own_settings(overrides: Sequence[str]) -> DictConfig:
    """Hydra's node, with what these overrides say of folders."""
    register_schema()
    own = [override for override in overrides if override.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
    with _hydra():
        settings: DictConfig = compose("config", own, return_hydra_config=True).hydra
        return settings


def check_composed(composed: DictConfig) -> tuple[RunConfig, list[str]]:
    """The dataclasses of what Hydra composed, with the model's defaults filled in and combinations checked; and
    warnings.

    Raises:
        ConfigError: a wrong type or a combination that cannot run.
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
    """One part of what Hydra composed and typed, as its dataclass."""
    value = composed[name]
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


# ---------------------------------------------------------------- names


# ---------------------------------------------------------------- combinations
