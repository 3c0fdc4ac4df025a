"""Hydra's -m with our own sweeper; Hydra itself takes sweepers of installed packages only."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import OmegaConf

from harness.config.yaml import ConfigError
from harness.records.search import Search
from harness.search.sweeper import OptunaSearch

TARGET = f"{OptunaSearch.__module__}.{OptunaSearch.__name__}"  # in conf/hydra/sweeper/


def search(hydra: Hydra, primary: str, task: TaskFunction, overrides: Sequence[str]) -> Search:
    """Run a search, as Hydra's `multirun` runs a sweep.

    Args:
        hydra: Hydra on the command's configurations.
        primary: Name of the primary configuration.
        task: Function that runs a job.
        overrides: The overrides of the command line.

    Returns:
        The search.

    Raises:
        ConfigError: A setting of the sweeper is missing, or there is no such setting.
    """
    config = hydra.compose_config(primary, [*overrides], RunMode.MULTIRUN, with_log_configuration=True)
    settings = {str(key): value for key, value in config.hydra.sweeper.items() if key != "_target_"}
    try:
        sweeper = OptunaSearch(**settings)
    except TypeError as error:
        raise ConfigError(f"hydra.sweeper: {error}") from error
    callbacks = Callbacks(config)
    callbacks.on_multirun_start(config=config, config_name=primary)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
    sweeper.setup(hydra_context=context, task_function=task, config=config)
    given = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    found = sweeper.sweep([str(override) for override in given or ()])
    callbacks.on_multirun_end(config=config, config_name=primary)
    return found
