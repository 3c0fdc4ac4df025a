"""Prompts of a class-conditional model: the name or the number of a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from models.components import Conditioning
from models.files import CheckpointError
from models.registry import did_you_mean


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
        name = prompt.strip()
        if not name:
            return self.classes
        if name in self.names:
            return self.names[name]
        if name.isdecimal() and int(name) < self.classes:
            return int(name)
        known = (
            "not a class"
            if self.names
            else "not a class number, and the checkpoint has no class names in model_index.json"
        )
        raise ValueError(
            f"prompt {name!r} is {known}{did_you_mean(name, self.names)} (give a name, or a number from 0 to "
            f"{self.classes - 1})"
        )

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


def read_names(index: Mapping[str, object]) -> dict[str, int]:
    """Return the class number of each name in the `id2label` of a model_index.json.

    It holds a comma-separated list of names for each class. If two classes share a name (crane, the bird and the
    machine), it means the later one, as in diffusers.

    Raises:
        CheckpointError: An id2label of another form.
    """
    found = index.get("id2label") or {}
    if not isinstance(found, dict):
        raise CheckpointError("model_index.json: id2label is not an object from class numbers to names")
    try:
        return {name.strip(): int(number) for number, line in found.items() for name in line.split(",")}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"model_index.json: id2label cannot be read ({error})") from error
