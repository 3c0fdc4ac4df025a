"""Prompts of a class-conditional model: the name or the number of a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from models.components import Conditioning
from models.prompt_rules import class_number


class ClassLabels:
    """Names and numbers of classes to labels; the empty prompt is the null class, guidance's negative branch.

    Source: the label names of diffusers' DiTPipeline.

    Args:
        names: The class number of each name, with the spelling of the checkpoint.
        classes: The number of classes; the null class comes after them.
        device: The device of the labels.
    """

    max_tokens = 1

    def __init__(self, names: Mapping[str, int], classes: int, device: torch.device | str = "cpu") -> None:
        self.names = names
        self.classes = classes
        self.device = device

    def label(self, prompt: str) -> int:
        """Return the class number of a prompt.

        Raises:
            ValueError: Neither a name nor a number of a class; the message has the nearest known name.
        """
        return class_number(prompt, self.names, self.classes)

    def check(self, prompt: str) -> None:
        """Raise ValueError if a prompt is no class, as in `label`."""
        self.label(prompt)

    def count(self, prompt: str) -> int:
        """Return 1, the token of one class; raise ValueError as in `label`."""
        self.label(prompt)
        return 1

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """Return the labels, (B,)."""
        return Conditioning(labels=torch.tensor([self.label(prompt) for prompt in prompts], device=self.device))
