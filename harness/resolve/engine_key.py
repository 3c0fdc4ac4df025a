"""What an engine is made of, as text: the whole pipeline, the weights that it loads, and the processes of its ranks.

Runs with equal `pipeline_key` share an engine as it is. With equal `weights_key`, its ranks only build another noise
scheduler and cache round the loaded networks. With equal `process_key`, its ranks can load the other run's weights in
place of theirs. Other runs need fresh ranks.
"""

from __future__ import annotations

import json

from harness.config.schema import RunConfig
from harness.config.tasks import TRAITS
from harness.config.yaml import to_dict
from harness.resolve.checkpoint_defaults import denoiser_defaults
from harness.resolve.engines_table import DIFFUSERS, NATIVE

BUILT_FROM = (
    *("engine", "model", "scheduler", "parallel", "attention", "cache", "stages", "launch", "serve"),
    *("plugin", "plugin_sources"),
)
SWAPPED = ("scheduler", "cache")
"""Groups that a pipeline follows without loading again."""
KEPT_FOR_LIFE = ("parallel", "serve", "plugin_sources")
"""Groups that a process follows only as it starts, beside parts of `engine` and `launch`."""


def pipeline_key(config: RunConfig) -> str:
    """Return what a pipeline is built from; nothing has to change between runs with equal keys."""
    return _text(config, BUILT_FROM)


def weights_key(config: RunConfig) -> str:
    """Return what the networks of a rank are loaded and optimised for, whatever the noise scheduler and the cache.

    The denoiser's folder follows from the noise scheduler's family.
    """
    loaded = tuple(part for part in BUILT_FROM if part not in SWAPPED)
    return _text(config, loaded, denoiser_defaults(config).weights)


def process_key(config: RunConfig) -> str:
    """Return what a process keeps for its life: environment, groups of ranks, and how engine.optimize treats memory.

    Measured ranks are not those of a reference, so that its weights are not in their memory. A server's ranks run one
    configuration. SGLang and cache-dit change the libraries that they import, so their ranks run nothing else.
    """
    traits, declared = TRAITS[config.task.name], to_dict(config)
    launch = {key: value for key, value in declared["launch"].items() if key != "reuse"}
    engine = declared["engine"] | {"name": NATIVE if config.engine.name == DIFFUSERS else config.engine.name}
    kept = [declared[part] for part in KEPT_FOR_LIFE]
    serves = pipeline_key(config) if traits.serves else None
    return json.dumps([traits.measures, launch, engine, *kept, serves], sort_keys=True)


def _text(config: RunConfig, parts: tuple[str, ...], *more: str) -> str:
    declared = to_dict(config)
    task = [config.task.name.name, config.task.fidelity]  # ranks compare their operators if fidelity is measured
    return json.dumps([*task, *(declared[part] for part in parts), *more], sort_keys=True)
