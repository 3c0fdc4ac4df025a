"""Guidance: the raw output of two branches, extrapolated from the negative to the prompt, by the checkpoint's rule."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from harness.parallel.group import Group, alone
from harness.pipeline.state import Ask, Sample, written
from models.components import CLASSIFIER_FREE, Conditioning, GuidanceRule


def guided(ask: Ask, rule: GuidanceRule) -> bool:
    """Whether a picture needs a negative branch."""
    return ask.guidance != 1 and not rule.embedded


class Branches:
    """The conditioning of a micro-batch: the prompts alone, or negative prompts and prompts in one batch of 2 B.

    combine() is eq. 6 of Ho and Salimans 2022 in diffusers' convention, negative + guidance * (prompt - negative), on
    the network's raw output; what a checkpoint's rule says otherwise is models.components.GuidanceRule.
    """

    def __init__(self, samples: list[Sample], rule: GuidanceRule = CLASSIFIER_FREE, ranks: Group | None = None) -> None:
        self.scale = samples[0].ask.guidance
        self.rule = rule
        self.ranks = alone() if ranks is None else ranks
        self.guided = guided(samples[0].ask, rule)
        told = [written(sample.text) for sample in samples]
        if self.guided:
            negative = [written(sample.negative) for sample in samples]
            told = [negative, told][self.ranks.index] if self.apart else negative + told
        self.condition = Conditioning.stack(told)
        if rule.embedded:
            device = written(samples[0].start).device
            self.condition = replace(self.condition, scale=torch.full((len(told),), self.scale, device=device))

    @property
    def apart(self) -> bool:
        """Whether each branch has a rank of its own."""
        return self.guided and self.ranks.size == 2

    def spread(self, x: Tensor) -> Tensor:
        """The state for every branch of this rank: (B, ...) to (B, ...) or (2 B, ...)."""
        return torch.cat([x, x]) if self.guided and not self.apart else x

    def combine(self, output: Tensor) -> Tensor:
        """The guided output: (B, ...) or (2 B, ...) to (B, ...)."""
        if not self.guided:
            return output
        negative, prompt = self.ranks.all_gather(output) if self.apart else output.chunk(2)
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
