"""Optuna's study, and what a search needs before its first trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from harness.config.yaml import ConfigError
from harness.records.search import Trial
from harness.search.objectives import objective

if TYPE_CHECKING:
    from optuna import Study

SAMPLERS = {"tpe": "TPESampler", "nsga2": "NSGAIISampler", "random": "RandomSampler"}
TASKS = ("generate", "bench", "load")  # those whose record has objectives
INSTALL = "hydra/sweeper=optuna_search needs the package optuna, version 4 or newer: pip install 'triptych[optuna]'"


def check_task(config: DictConfig, objectives: Sequence[str]) -> None:
    """Refuse a search whose jobs would not measure its objectives.

    Args:
        config: The composed configuration of the sweep.
        objectives: The objectives.

    Raises:
        ConfigError: The task leaves no record of a request, or a key is not set.
    """
    task = config.task.name.name
    if task not in TASKS:
        raise ConfigError(f"task={task} measures no objective of a search; use task=bench")
    for name in objectives:
        found = objective(name)
        if found is not None and found.key and not OmegaConf.select(config, found.key):
            raise ConfigError(f"hydra.sweeper.objectives has {name}, which is measured only with {found.key}; set it")


def check_settings(params: object, **counts: object) -> None:
    """Refuse settings of the sweeper that have the wrong type.

    Args:
        params: Swept keys of a file, KEY: VALUES.
        **counts: Whole numbers, 1 or more.

    Raises:
        ConfigError: One of them is something else.
    """
    if not isinstance(params, Mapping):
        raise ConfigError(f"hydra.sweeper.params={params}; give KEY: VALUES, such as {{request.steps: 4,8}}")
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ConfigError(f"hydra.sweeper.{name}={count}; give a whole number, 1 or more")


def new_study(directions: Sequence[str], sampler: str, seed: int) -> Study:
    """Return a study in memory.

    Args:
        directions: minimize or maximize, for each objective.
        sampler: Name of the sampler.
        seed: Seed of the sampler.

    Returns:
        The study.

    Raises:
        ConfigError: The sampler is unknown, the seed is no whole number, or Optuna is missing or too old.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"hydra.sweeper.sampler={sampler}; there are {', '.join(SAMPLERS)}")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"hydra.sweeper.seed={seed}; give a whole number from 0 to {2**32 - 1}")
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ConfigError(INSTALL) from error
    if int(optuna.__version__.partition(".")[0]) < 4:
        raise ConfigError(f"{INSTALL}; there is {optuna.__version__}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen = getattr(optuna.samplers, SAMPLERS[sampler])(seed=seed)
    return optuna.create_study(directions=[*directions], sampler=chosen)


def add_trial(study: Study, trial: Trial) -> None:
    """Tell a study what a trial measured; one without values has failed and is never among the best."""
    from optuna.trial import TrialState

    values = trial.measured.values
    study.tell(trial.number, values, None if values is not None else TrialState.FAIL)


def front(study: Study, trials: Sequence[Trial]) -> list[int]:
    """Return the numbers of the best trials, one for each run."""
    best = {each.number for each in study.best_trials}
    runs = {trial.measured.folder: trial.number for trial in reversed(trials) if trial.number in best}
    return sorted(runs.values())
