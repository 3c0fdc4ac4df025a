"""Which denoiser of a checkpoint runs, and what it was trained with: facts that the noise scheduler has to follow."""

from __future__ import annotations

from dataclasses import fields

from harness.config.schema import CheckpointDefaults, Load, RunConfig, SamplingDefaults, TrainingSettings

PUBLISHED_FAMILY = "published"  # scheduler=published: the noise scheduler of the checkpoint's own file


def denoiser_defaults(config: RunConfig) -> CheckpointDefaults:
    """The checkpoint's denoiser of the chosen noise-scheduler family.

    Random weights run in every family: where the checkpoint has no denoiser of the chosen one, they have the sizes of
    the first that it names.

    Raises:
        ValueError: a family that the checkpoint was not trained in.
    """
    model, family = config.model, config.scheduler.family
    if family in model.checkpoint_defaults:
        return model.checkpoint_defaults[family]
    if family == PUBLISHED_FAMILY and model.checkpoint_defaults:
        return next(iter(model.checkpoint_defaults.values()))
    if not model.checkpoint_defaults:
        raise ValueError(f"model={model.name} names no denoiser; add one: {_adding(family)}")
    if model.load is Load.checkpoint:
        raise ValueError(
            f"model={model.name} was trained as {', '.join(model.checkpoint_defaults)}, not {family}; "
            f"use scheduler={' or scheduler='.join(model.checkpoint_defaults)}, or model.load=dummy for random weights; "
            f"for weights of your own: {_adding(family)}"
        )
    return next(iter(model.checkpoint_defaults.values()))


def _adding(family: str) -> str:
    return f"'+model.checkpoint_defaults={{{family}: {{weights: FOLDER}}}}'"


def apply_training_facts(config: RunConfig) -> None:
    """Fills the scheduler's keys that are null with the facts of the chosen family's training, in place.

    Raises:
        ValueError: a key that says otherwise than trained weights; random weights may be told anything.
    """
    model, asked = config.model, config.scheduler
    if asked.family not in model.checkpoint_defaults:
        return
    trained = model.checkpoint_defaults[asked.family]
    for name in (choice.name for choice in fields(SamplingDefaults)):
        if getattr(asked, name) is None:
            setattr(asked, name, getattr(trained, name))
    for name in (fact.name for fact in fields(TrainingSettings)):
        fact, wanted = getattr(trained, name), getattr(asked, name)
        if wanted is None:
            setattr(asked, name, fact)
        elif fact not in (None, wanted) and model.load is Load.checkpoint:
            raise ValueError(
                f"scheduler.{name}={wanted} contradicts the checkpoint, which was trained with {fact}; drop it, or use "
                f"model.load=dummy (for weights of your own: model.checkpoint_defaults.{asked.family}.{name}={wanted})"
            )
