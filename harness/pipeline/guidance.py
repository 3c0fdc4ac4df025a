"""Guidance: the raw output of two branches, extrapolated from the negative to the prompt, by the checkpoint's rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from harness.parallel.group import Group, single_process_group
from harness.pipeline.state import ImageSpec, Sample, require
from models.components import CLASSIFIER_FREE, Conditioning, GuidanceRule
from schedulers.grid import Point


def needs_negative(spec: ImageSpec, rule: GuidanceRule) -> bool:
    """Return whether an image needs a negative branch."""
    return spec.guidance != 1 and not rule.embedded


class GuidanceMode(Enum):
    """How one evaluation of a guided image is computed.

    Attributes:
        both: both branches.
        reuse_difference: the prompt's branch, with the latest difference between the two.
        prompt_only: the prompt's branch without guidance.
    """

    both = "both"
    reuse_difference = "reuse difference"
    prompt_only = "prompt only"


class GuidanceSchedule(Protocol):
    """Chooses the mode of each evaluation."""

    def __call__(self, evaluation: int, point: Point) -> GuidanceMode:
        """Return the mode of an evaluation.

        Args:
            evaluation: the number of the evaluation, from 0.
            point: the evaluation's point on the path.

        Returns:
            The mode.
        """


def always_guided(evaluation: int, point: Point) -> GuidanceMode:
    """Compute both branches in every evaluation."""
    return GuidanceMode.both


@dataclass(frozen=True)
class GuidanceInterval:
    """Guidance only if low < sigma / alpha <= high.

    Source: Kynkaanniemi et al. 2024 (arXiv:2404.07724), whose sigma is for alpha = 1.

    Args:
        low: the lower end of the interval.
        high: the upper end of the interval.
    """

    low: float
    high: float

    def __call__(self, evaluation: int, point: Point) -> GuidanceMode:
        """Guide inside the interval."""
        return GuidanceMode.both if self.low < point.ratio <= self.high else GuidanceMode.prompt_only


@dataclass(frozen=True)
class GuidanceReuse:
    """After a warm-up, one evaluation of `interval` computes both branches; the others reuse its difference.

    Source: the guidance cache of FasterCache (Lv et al. 2024, arXiv:2410.19355), without its weights of frequencies.

    Args:
        warmup: the number of first evaluations with both branches.
        interval: evaluations from one with both branches to the next.
    """

    warmup: int
    interval: int

    def __call__(self, evaluation: int, point: Point) -> GuidanceMode:
        """Compute both branches in the warm-up and at every interval."""
        return (
            GuidanceMode.both
            if evaluation < self.warmup or (evaluation - self.warmup + 1) % self.interval == 0
            else GuidanceMode.reuse_difference
        )


class Combine(Protocol):
    """A guidance rule: how the outputs of the two branches become one."""

    def __call__(self, negative: Tensor, prompt: Tensor, scale: float, point: Point) -> Tensor:
        """Return the guided output.

        Args:
            negative: the raw output for the negative prompts, (B, ...), float32.
            prompt: the raw output for the prompts, (B, ...), float32.
            scale: the guidance scale.
            point: the evaluation's point on the path.

        Returns:
            The guided output, (B, ...).
        """


def classifier_free(negative: Tensor, prompt: Tensor, scale: float, point: Point) -> Tensor:
    """Extrapolate from the negative branch to the prompt's: eq. 6 of Ho and Salimans 2022, in diffusers' convention."""
    return negative + scale * (prompt - negative)


class Branches:
    """The conditioning of a micro-batch: the prompts alone, or negative prompts and prompts in one batch of 2 B rows.

    combine() applies the guidance rule to the network's raw output, and then what the checkpoint adds to it
    (models.components.GuidanceRule). In an evaluation with only the prompt's branch, both ranks of a split pair compute
    it.

    Args:
        samples: the samples of the micro-batch.
        rule: how the checkpoint is guided.
        ranks: the ranks of the two branches; None for this rank alone.
        mix: the guidance rule.
    """

    def __init__(
        self,
        samples: list[Sample],
        rule: GuidanceRule = CLASSIFIER_FREE,
        ranks: Group | None = None,
        mix: Combine = classifier_free,
    ) -> None:
        self.mix = mix
        self.scale = samples[0].spec.guidance
        self.rule = rule
        self.ranks = single_process_group() if ranks is None else ranks
        self.guided = needs_negative(samples[0].spec, rule)
        conditions = [require(sample.text) for sample in samples]
        if self.guided:
            negative = [require(sample.negative) for sample in samples]
            conditions = [negative, conditions][self.ranks.index] if self.is_split else negative + conditions
        self.condition = Conditioning.stack(conditions)
        if rule.embedded:
            device = require(samples[0].start).device
            self.condition = replace(self.condition, scale=torch.full((len(conditions),), self.scale, device=device))
        prompts = [require(sample.text) for sample in samples]
        self.prompt = Conditioning.stack(prompts) if self.guided else self.condition
        self._difference: Tensor | None = None

    def condition_for(self, mode: GuidanceMode) -> Conditioning:
        """Return the network's conditioning in an evaluation of this mode."""
        return self.condition if mode is GuidanceMode.both else self.prompt

    def rows_per_image(self, mode: GuidanceMode) -> int:
        """Return the branches of an image that are evaluated, on whichever ranks."""
        return 2 if self.guided and mode is GuidanceMode.both else 1

    @property
    def is_split(self) -> bool:
        """Whether each branch has a rank of its own."""
        return self.guided and self.ranks.size == 2

    def duplicate(self, x: Tensor, mode: GuidanceMode = GuidanceMode.both) -> Tensor:
        """Return the state for every branch of this rank: (B, ...) to (B, ...) or (2 B, ...)."""
        return torch.cat([x, x]) if self.guided and not self.is_split and mode is GuidanceMode.both else x

    def combine(self, output: Tensor, point: Point, mode: GuidanceMode = GuidanceMode.both) -> Tensor:
        """Return the guided output at a point of the path: (B, ...) or (2 B, ...) to (B, ...)."""
        if not self.guided or mode is GuidanceMode.prompt_only:
            return output
        if mode is GuidanceMode.both:
            negative, prompt = self.ranks.all_gather(output) if self.is_split else output.chunk(2)
            self._difference = prompt - negative
        else:
            negative, prompt = output - require(self._difference), output
        mixed = self.mix(negative, prompt, self.scale, point)
        if self.rule.token_norm is not None:
            mixed = mixed * token_norms(prompt, self.rule.token_norm) / token_norms(mixed, self.rule.token_norm)
        if self.rule.channels is not None:
            mixed = torch.cat([mixed[:, : self.rule.channels], prompt[:, self.rule.channels :]], dim=1)
        return mixed


def token_norms(x_BCHW: Tensor, side: int) -> Tensor:
    """Return the norm of every token, repeated over its pixels. A token is all channels of side x side latent pixels.

    Source: Qwen-Image (Wu et al. 2025, arXiv:2508.02324), in diffusers' QwenImagePipeline.

    Args:
        x_BCHW: the raw output.
        side: latent pixels of a token on a side.

    Returns:
        The norms, (B, 1, H, W).
    """
    squares_B1HW = x_BCHW.square().sum(dim=1, keepdim=True)
    cells = squares_B1HW.unflatten(-2, (-1, side)).unflatten(-1, (-1, side))
    sums = cells.sum(dim=(-3, -1), keepdim=True).sqrt().expand_as(cells)
    return sums.flatten(-2).flatten(-3, -2)
