"""A sweeper of Hydra that lets Optuna choose the jobs (ask), and tells it what they measured.

Hydra's own plug-in for Optuna stays at version 2. This one asks and tells, so any launcher of Hydra's runs the jobs. A
search in the folder of an earlier one, with the same seed, goes on with its runs: jobs that are done are not run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from harness.config.yaml import ConfigError
from harness.records.search import Measured, Search, Trial, write_search
from harness.search.objectives import resolve_directions
from harness.search.space import distribution
from harness.search.study import add_trial, check_settings, check_task, front, new_study


class OptunaSearch(Sweeper):
    """Searches for the trials that no other one beats; conf/hydra/sweeper/optuna_search.yaml explains the settings."""

    def __init__(
        self,
        objectives: Sequence[str],
        directions: Sequence[str] | None,
        n_trials: int,
        n_jobs: int,
        sampler: str,
        seed: int,
        params: Mapping[str, str] | None,
    ) -> None:
        self._objectives, self._given_directions = objectives, directions
        self._n_trials, self._n_jobs, self._sampler, self._seed = n_trials, n_jobs, sampler, seed
        self._params: Mapping[str, str] = {} if params is None else params
        self._measured: dict[tuple[str, ...], Measured] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Check the settings, before any job runs."""
        self._directions = resolve_directions(self._objectives, self._given_directions)
        check_task(config, self._objectives)
        check_settings(self._params, n_trials=self._n_trials, n_jobs=self._n_jobs)
        self._study = new_study(self._directions, self._sampler, self._seed)
        self._folder, self._loader = Path(str(config.hydra.sweep.dir)), hydra_context.config_loader
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Search:
        """Run all trials.

        Args:
            arguments: The overrides of the command line.

        Returns:
            The search, which is in `search.json` after every batch.

        Raises:
            ConfigError: No key has several values.
        """
        given = [*(f"{key}={values}" for key, values in self._params.items()), *arguments]
        parsed = OverridesParser.create(self._loader).parse_overrides(given)
        keys = {override.get_key_element(): override for override in parsed}
        swept = {key: override for key, override in keys.items() if override.is_sweep_override()}
        if not swept:
            raise ConfigError("a search needs a key with several values, such as request.steps='range(4,21)'")
        space = {key: distribution(override) for key, override in swept.items()}
        fixed = [f"{key}={each.get_value_element_as_str()}" for key, each in keys.items() if key not in swept]
        texts = {key: str(override.input_line).partition("=")[2] for key, override in swept.items()}
        search = Search([*self._objectives], self._directions, self._sampler, self._seed, texts, [], [])
        while len(search.trials) < self._n_trials:
            chosen = [self._study.ask(space) for _ in range(min(self._n_jobs, self._n_trials - len(search.trials)))]
            jobs = [(*fixed, *(f"{key}={value}" for key, value in trial.params.items())) for trial in chosen]
            self._run(jobs)
            for trial, job in zip(chosen, jobs, strict=True):
                params = {key: str(value) for key, value in trial.params.items()}
                search.trials.append(Trial(trial.number, params, self._measured[job]))
                add_trial(self._study, search.trials[-1])
            search.front[:] = front(self._study, search.trials)
            write_search(self._folder, search)
        return search

    def _run(self, jobs: Sequence[tuple[str, ...]]) -> None:
        """Run those of some jobs that have not run; a job that raises ends the search."""
        new = [job for job in dict.fromkeys(jobs) if job not in self._measured]
        if new:
            done = self._launcher.launch([[*job] for job in new], initial_job_idx=len(self._measured))
            self._measured |= {job: each.return_value for job, each in zip(new, done, strict=True)}
