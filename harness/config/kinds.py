"""What plug-ins add to a run besides choices of groups: stages, guidance rules and metrics, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

from schedulers.registry import Common, Registry, Target

OUR_STAGES = (
    "input_validation",
    "text_encoding",
    "timestep_preparation",
    "latent_preparation",
    "denoising",
    "decoding",
)
"""The stages of every pipeline, in order."""
CLASSIFIER_FREE = "classifier_free"


@dataclass(frozen=True)
class StageEntry:
    """One stage that a configuration may add.

    Attributes:
        make: MakeStage (harness.pipeline.composed).
        before: Stage that it comes before; empty if `after` is given.
        after: Stage that it comes after; empty if `before` is given.
    """

    make: Target
    before: str = ""
    after: str = ""


STAGES: Registry[StageEntry] = Registry("stage", "stages")
"""Stages by name, besides OUR_STAGES."""
GUIDANCE_RULES: Registry[Target] = Registry("guidance rule", "model.guidance_rule")
"""Guidance rules by name: Combine (harness.pipeline.guidance)."""
METRICS: Registry[Target] = Registry("metric", "quality.metrics")
"""Metrics by name: ImageMetric (harness.metrics.own)."""


def register_stage(
    name: str,
    make: Target,
    *,
    before: str = "",
    after: str = "",
    **common: Unpack[Common],
) -> None:
    """Register a stage, for `stages`.

    Args:
        name: The stage's name, also in the record.
        make: MakeStage (harness.pipeline.composed): a function of the run and its components that returns the stage.
        before: Stage that it comes before.
        after: Stage that it comes after, if `before` is not given.
        **common: Options of its own, its layouts, and whether requests may share its forwards.

    Raises:
        ValueError: Not one of `before` and `after` is given, or the name is that of another stage.
    """
    if bool(before) == bool(after):
        raise ValueError(f"stage {name!r}: give before=STAGE or after=STAGE, one of {', '.join(OUR_STAGES)}")
    if name in OUR_STAGES:
        raise ValueError(f"stage {name!r} has the name of a stage of every pipeline; rename it")
    entry = StageEntry(make, before, after)
    STAGES.register(name, entry, **common)


def register_guidance(
    name: str,
    combine: Target,
    **common: Unpack[Common],
) -> None:
    """Register a guidance rule, for model.guidance_rule.

    Args:
        name: The rule's name.
        combine: Combine (harness.pipeline.guidance): the function that combines the outputs of the two branches.
        **common: Options of its own, its layouts, and whether requests may share its forwards.
    """
    GUIDANCE_RULES.register(name, combine, **common)


def register_metric(name: str, measure: Target, **common: Unpack[Common]) -> None:
    """Register a metric of images, for quality.metrics.

    Args:
        name: The metric's name, also in the record.
        measure: ImageMetric (harness.metrics.own): the function of images and prompts that returns a number.
        **common: Options of its own.
    """
    METRICS.register(name, measure, **common)


register_guidance(CLASSIFIER_FREE, "harness.pipeline.guidance:classifier_free")
