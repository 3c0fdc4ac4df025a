"""Which prompts a network without a text encoder takes: the classes of DiT, and none; without torch."""

from __future__ import annotations

from collections.abc import Mapping

from models.files import CheckpointError
from models.registry import did_you_mean


def class_number(prompt: str, names: Mapping[str, int], classes: int) -> int:
    """Return the class number of a prompt; the empty prompt is the null class, which comes after the others.

    Args:
        prompt: Name or number of a class.
        names: The class number of each name; empty if the checkpoint has no names.
        classes: The number of classes.

    Returns:
        The number.

    Raises:
        ValueError: Neither a name nor a number of a class; the message has the nearest known name.
    """
    name = prompt.strip()
    if not name:
        return classes
    if name in names:
        return names[name]
    if name.isdecimal() and int(name) < classes:
        return int(name)
    known = "not a class" if names else "not a class number, and the checkpoint has no class names in model_index.json"
    raise ValueError(
        f"prompt {name!r} is {known}{did_you_mean(name, names)} (give a name, or a number from 0 to {classes - 1})"
    )


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


def check_no_prompt(prompt: str) -> None:
    """Raise an error for a prompt that is not empty.

    Raises:
        ValueError: The prompt is not empty.
    """
    if prompt:
        raise ValueError(f"this model takes no prompt, but got {prompt[:40]!r}; use request.prompt=''")
