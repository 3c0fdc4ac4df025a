"""Prompts of a class-conditional model: the name or the number of a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from models.components import Conditioning
from models.files import CheckpointError
from models.registry import nearest


class ClassLabels:
    """Names and numbers of classes to labels; the empty prompt is the null class, which guidance moves away from.

    Args:
        names: from a name to its class, as it is written there.
        classes: how many classes there are; the null class is the one after them.
        device: where labels live.

    Source: the label names of diffusers' DiTPipeline.
    """

    max_tokens = 1

    def __init__(self, names: Mapping[str, int], classes: int, device: torch.device | str = "cpu") -> None:
        self.names = names
        self.classes = classes
        self.device = device

    def label(self, prompt: str) -> int:
        """The class of a prompt.

        Raises:
            ValueError: no name and no number of a class, with the nearest known name.
        """
        asked = prompt.strip()
        if not asked:
            return self.classes
        if asked in self.names:
            return self.names[asked]
        if asked.isdecimal() and int(asked) < self.classes:
            return int(asked)
        known = "no class" if self.names else "no number of a class, and the checkpoint names none in model_index.json"
        raise ValueError(
            f"prompt {asked!r} is {known}{nearest(asked, self.names)} (give a name, or a number from 0 to "
            f"{self.classes - 1})"
        )

    def check(self, prompt: str) -> None:
        """Refuses what is no class. Raises as `label`."""
        self.label(prompt)

    def count(self, prompt: str) -> int:
        """One class. Raises as `label`."""
        self.label(prompt)
        return 1

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """Labels (B,)."""
        return Conditioning(labels=torch.tensor([self.label(prompt) for prompt in prompts], device=self.device))


def read_names(index: Mapping[str, object]) -> dict[str, int]:
    """The names in `id2label` of a model_index.json, which has for each class a list with commas.

    Where two classes share a name (crane, the bird and the machine), it is the later one's, as in diffusers.

    Raises:
        CheckpointError: an id2label of another form.
    """
    found = index.get("id2label") or {}
    if not isinstance(found, dict):
        raise CheckpointError("model_index.json: id2label is no object from class numbers to names")
    try:
        return {name.strip(): int(number) for number, line in found.items() for name in line.split(",")}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"model_index.json: id2label cannot be read ({error})") from error
