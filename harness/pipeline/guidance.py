"""Classifier-free guidance: the raw output of two branches, extrapolated from the negative to the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.pipeline.state import Sample, written
from models.components import TextStates


class Branches:
    """The text of a micro-batch: the prompts alone, or the negative prompts and the prompts in one batch of 2 B.

    combine() is eq. 6 of Ho and Salimans 2022 in diffusers' convention, negative + guidance * (prompt - negative), on
    the network's raw output.
    """

    def __init__(self, samples: list[Sample]) -> None:
        self.guidance = samples[0].ask.guidance
        texts = [written(sample.text) for sample in samples]
        if self.guided:
            texts = [written(sample.negative) for sample in samples] + texts
        self.text = TextStates(torch.cat([text.states for text in texts]), torch.cat([text.mask for text in texts]))

    @property
    def guided(self) -> bool:
        """Whether there are two branches."""
        return self.guidance != 1

    def spread(self, x_BCHW: Tensor) -> Tensor:
        """The state for every branch: (B, ...) to (B, ...) or (2 B, ...)."""
        return torch.cat([x_BCHW, x_BCHW]) if self.guided else x_BCHW

    def combine(self, output: Tensor) -> Tensor:
        """The guided output: (B, ...) or (2 B, ...) to (B, ...)."""
        if not self.guided:
            return output
        negative, prompt = output.chunk(2)
        return negative + self.guidance * (prompt - negative)
