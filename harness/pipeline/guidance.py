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
    """Whether a picture needs a negative branch."""
    return spec.guidance != 1 and not rule.embedded


class GuidanceMode(Enum):
    """How one evaluation of a guided picture is made: of both branches; of the prompt's, with the difference between
    the two as it was last; or of the prompt's alone, which is not guided.
    """

    both = "both"
    reuse_difference = "reuse difference"
    prompt_only = "prompt only"


class GuidanceSchedule(Protocol):
    """Which way an evaluation goes."""

    def __call__(self, evaluation: int, point: Point) -> GuidanceMode:
        """Of evaluation number `evaluation`, from 0, at a point of the path."""


def always_guided(evaluation: int, point: Point) -> GuidanceMode:
    """Every evaluation is of both branches."""
    return GuidanceMode.both


@dataclass(frozen=True)
class GuidanceInterval:
    """Guided where low < sigma / alpha <= high, and nowhere else.

    Source: Kynkaanniemi et al. 2024 (arXiv:2404.07724), whose sigma is that of alpha = 1.
    """

    low: float
    high: float

    def __call__(self, evaluation: int, point: Point) -> GuidanceMode:
        return GuidanceMode.both if self.low < point.ratio <= self.high else GuidanceMode.prompt_only


@dataclass(frozen=True)
class GuidanceReuse:
    """After a warm-up one evaluation of `interval` is of both branches; the others keep the difference it found.

    Source: the guidance cache of FasterCache (Lv et al. 2024, arXiv:2410.19355), without its weights of frequencies.
    """

    warmup: int
    interval: int

    def __call__(self, evaluation: int, point: Point) -> GuidanceMode:
        return (
            GuidanceMode.both
            if evaluation < self.warmup or (evaluation - self.warmup + 1) % self.interval == 0
            else GuidanceMode.reuse_difference
        )


class Branches:
    """The conditioning of a micro-batch: the prompts alone, or negative prompts and prompts in one batch of 2 B.

    combine() is eq. 6 of Ho and Salimans 2022 in diffusers' convention, negative + guidance * (prompt - negative), on
    the network's raw output; what a checkpoint's rule says otherwise is models.components.GuidanceRule. Where an
    evaluation goes another way than that of both branches, every rank of the two makes it of the prompt.
    """

    def __init__(self, samples: list[Sample], rule: GuidanceRule = CLASSIFIER_FREE, ranks: Group | None = None) -> None:
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
        """What the network is told in an evaluation that goes this way."""
        return self.condition if mode is GuidanceMode.both else self.prompt

    def rows_per_image(self, mode: GuidanceMode) -> int:
        """Branches of a picture that are evaluated, on whichever ranks."""
        return 2 if self.guided and mode is GuidanceMode.both else 1

    @property
    def is_split(self) -> bool:
        """Whether each branch has a rank of its own."""
        return self.guided and self.ranks.size == 2

    def duplicate(self, x: Tensor, mode: GuidanceMode = GuidanceMode.both) -> Tensor:
        """The state for every branch of this rank: (B, ...) to (B, ...) or (2 B, ...)."""
        return torch.cat([x, x]) if self.guided and not self.is_split and mode is GuidanceMode.both else x

    def combine(self, output: Tensor, mode: GuidanceMode = GuidanceMode.both) -> Tensor:
        """The guided output: (B, ...) or (2 B, ...) to (B, ...)."""
        if not self.guided or mode is GuidanceMode.prompt_only:
            return output
        if mode is GuidanceMode.both:
            negative, prompt = self.ranks.all_gather(output) if self.is_split else output.chunk(2)
            self._difference = prompt - negative
        else:
            negative, prompt = output - require(self._difference), output
        mixed = negative + self.scale * (prompt - negative)
        if self.rule.token_norm is not None:
            mixed = mixed * token_norms(prompt, self.rule.token_norm) / token_norms(mixed, self.rule.token_norm)
        if self.rule.channels is not None:
            mixed = torch.cat([mixed[:, : self.rule.channels], prompt[:, self.rule.channels :]], dim=1)
        return mixed


def token_norms(x_BCHW: Tensor, side: int) -> Tensor:
    """The norm of every token of side x side latent pixels and all channels, at each of its pixels: (B, 1, H, W).

    Source: Qwen-Image (Wu et al. 2025, arXiv:2508.02324), in diffusers' QwenImagePipeline.
    """
    squares_B1HW = x_BCHW.square().sum(dim=1, keepdim=True)
    cells = squares_B1HW.unflatten(-2, (-1, side)).unflatten(-1, (-1, side))
    sums = cells.sum(dim=(-3, -1), keepdim=True).sqrt().expand_as(cells)
    return sums.flatten(-2).flatten(-3, -2)
