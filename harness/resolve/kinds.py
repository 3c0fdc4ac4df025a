"""Whether the attention backend, guidance rule and stages that a configuration names can run; without torch."""

from __future__ import annotations

import warnings

from harness.config.engines import NATIVE
from harness.config.kinds import CLASSIFIER_FREE, OUR_STAGES, STAGES
from harness.config.schema import RunConfig
from harness.resolve.layout_rules import ModelShape
from models.registry import ARCHITECTURES, ATTENTION_BACKENDS


def check_attention(config: RunConfig) -> None:
    """Refuse an attention backend that does not take the network's dtype or masks.

    Raises:
        ValueError: One line says what to change.
    """
    name, model = config.attention.backend, config.model
    if name not in ATTENTION_BACKENDS:
        return  # auto takes all
    entry, dtype = ATTENTION_BACKENDS[name], model.dtype.name
    if entry.dtypes and dtype not in entry.dtypes:
        raise ValueError(
            f"attention.backend={name} computes in {' and '.join(entry.dtypes)}, and model.dtype={dtype}; use "
            f"model.dtype={entry.dtypes[0]} or attention=sdpa"
        )
    if ARCHITECTURES[model.architecture].masks and not entry.masks:
        raise ValueError(
            f"attention.backend={name} takes no mask, and model={model.name} masks padded text; use attention=sdpa"
        )


def check_guidance_rule(config: RunConfig, shape: ModelShape) -> None:
    """Refuse a guidance rule in a baseline engine, and warn of one that has no effect.

    Args:
        config: The configuration.
        shape: The model shape of its request.

    Raises:
        ValueError: The engine guides by itself.
    """
    rule, engine = config.model.guidance_rule, config.engine.name
    if rule == CLASSIFIER_FREE:
        return
    if engine != NATIVE:
        raise ValueError(
            f"model.guidance_rule={rule} does not go with engine={engine}, which guides by itself; use engine=native"
        )
    if shape.embedded or shape.guidance == 1:
        why = "the network takes the scale as an input" if shape.embedded else "request.guidance=1 has one branch"
        warnings.warn(f"model.guidance_rule={rule} has no effect: {why}", stacklevel=2)


def check_stages(config: RunConfig) -> None:
    """Refuse a stage that is named twice, or comes beside one that is not there.

    Raises:
        ValueError: One line says what to change.
    """
    there = list(OUR_STAGES)
    for name in config.stages:
        if name in there:
            raise ValueError(f"stages names {name} twice; name it once")
        beside = STAGES[name].before or STAGES[name].after
        if beside not in there:
            remedy = f"name {beside} before {name}" if beside in STAGES else f"it may be one of {', '.join(there)}"
            raise ValueError(f"stages={name} comes beside {beside}, which is not there; {remedy}")
        there.append(name)
