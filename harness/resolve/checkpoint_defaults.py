"""Which denoiser of a checkpoint runs, and what it was trained with, which the noise scheduler has to follow."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from harness.config.schema import CheckpointDefaults, Load, RunConfig
from models.files import read_json
from schedulers.settings import SamplingDefaults, TrainingSettings

PUBLISHED_FAMILY = "published"  # scheduler=published: the noise scheduler of the checkpoint's own file


def denoiser_defaults(config: RunConfig) -> CheckpointDefaults:
    """Return the defaults of the checkpoint's denoiser for the chosen noise-scheduler family.

    Random weights run in every family. If the checkpoint has no denoiser of the chosen family, they have the sizes of
    the first one that it names.

    Args:
        config: The configuration.

    Returns:
        The entry of `model.checkpoint_defaults`.

    Raises:
        ValueError: The checkpoint was not trained in this family.
    """
    model, family = config.model, config.scheduler.family
    if family in model.checkpoint_defaults:
        return model.checkpoint_defaults[family]
    if family == PUBLISHED_FAMILY and model.checkpoint_defaults:
        return next(iter(model.checkpoint_defaults.values()))
    if not model.checkpoint_defaults:
        raise ValueError(f"model={model.name} names no denoiser; add one: {_example(family)}")
    if model.load is Load.checkpoint:
        raise ValueError(
            f"model={model.name} was trained as {', '.join(model.checkpoint_defaults)}, not {family}; "
            f"use scheduler={' or scheduler='.join(model.checkpoint_defaults)}, or model.load=dummy for random weights;"
            f" for weights of your own: {_example(family)}"
        )
    return next(iter(model.checkpoint_defaults.values()))


def _example(family: str) -> str:
    return f"'+model.checkpoint_defaults={{{family}: {{weights: FOLDER}}}}'"


def apply_training_facts(config: RunConfig) -> None:
    """Fill the scheduler's null keys, in place, with what the chosen family's denoiser was trained with.

    Args:
        config: The configuration, changed in place.

    Raises:
        ValueError: A key contradicts trained weights; random weights may be combined with anything.
    """
    model, scheduler = config.model, config.scheduler
    if scheduler.family not in model.checkpoint_defaults:
        return
    trained = model.checkpoint_defaults[scheduler.family]
    for name in (choice.name for choice in fields(SamplingDefaults)):
        if getattr(scheduler, name) is None:
            setattr(scheduler, name, getattr(trained, name))
    for name in (fact.name for fact in fields(TrainingSettings)):
        fact, wanted = getattr(trained, name), getattr(scheduler, name)
        if wanted is None:
            setattr(scheduler, name, fact)
        elif fact not in (None, wanted) and model.load is Load.checkpoint:
            raise ValueError(
                f"scheduler.{name}={wanted} contradicts the checkpoint, which was trained with {fact}; drop it, or use "
                "model.load=dummy (for weights of your own: "
                f"model.checkpoint_defaults.{scheduler.family}.{name}={wanted})"
            )


def check_learned_variance(config: RunConfig, denoiser: Path) -> None:
    """Refuse a learned variance of a network that has no output for one.

    Args:
        config: The configuration, its scheduler filled with the training facts.
        denoiser: The folder of the denoiser's config.json.

    Raises:
        ValueError: The message says which key to set.
    """
    family = config.scheduler.family
    if family == PUBLISHED_FAMILY or not config.scheduler.learned_variance:
        return
    network = read_json(denoiser / "config.json")
    channels, outputs = network.get("in_channels"), network.get("out_channels")
    if not isinstance(channels, int) or outputs != 2 * channels:
        trained = config.model.checkpoint_defaults.get(family)
        key = f"model.checkpoint_defaults.{family}" if trained is not None and trained.learned_variance else "scheduler"
        raise ValueError(
            f"{key}.learned_variance=true, but the network of model={config.model.name} outputs none; set "
            f"{key}.learned_variance=false"
        )
