"""What the options of a library's config.json may be, so that a table of tensors holds for them; without torch.

A rule is the library's default, and a test of values. A configuration outside of the rules has no table here. A value
that breaks a rule with Values is refused: the library builds nothing of it, or nothing that weights fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from models.files import CheckpointError

MAX_SHOWN = 60  # characters of a value in a message
Rule = tuple[Any, Callable[[Any], bool]]


def is_size(value: object) -> bool:
    """Return whether a value is a whole number above 0."""
    return type(value) is int and value > 0


def is_flag(value: object) -> bool:
    """Return whether a value is true or false."""
    return isinstance(value, bool)


def one_of(*values: object) -> Callable[[object], bool]:
    """Return a test for some values."""
    return lambda value: any(value is known or (type(value) is type(known) and value == known) for known in values)


def optional(test: Callable[[Any], bool]) -> Callable[[object], bool]:
    """Return a test that null passes too."""
    return lambda value: value is None or test(value)


def list_of(test: Callable[[Any], bool]) -> Callable[[object], bool]:
    """Return a test of every item of a list."""
    return lambda value: isinstance(value, list) and len(value) > 0 and all(test(item) for item in value)


def one_or_list_of(test: Callable[[Any], bool]) -> Callable[[object], bool]:
    """Return a test of one value, or of every item of a list."""
    return lambda value: test(value) or list_of(test)(value)


class RefusedOption(CheckpointError):
    """A value of an option from which a library can build no network; the message lacks the file.

    Args:
        name: The option's name.
        value: The value that was given.
        fits: The values that it may have, in words.
    """

    def __init__(self, name: str, value: object, fits: str) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
        super().__init__(f"{name}={shown} does not fit; give {fits}")


@dataclass(frozen=True)
class Values:
    """The values that an option may have.

    Args:
        words: The values in words.
        test: The function that returns whether a value is one of them.
    """

    words: str
    test: Callable[[Any], bool]

    def __call__(self, value: object) -> bool:
        """Return whether the option may have a value."""
        return self.test(value)


def is_number(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def all_of(test: Callable[[Any], bool]) -> Callable[[object], bool]:
    """Return a test of every item of a list, which may be empty."""
    return lambda value: isinstance(value, list) and all(test(item) for item in value)


SIZE = Values("a whole number above 0", is_size)
OPTIONAL_SIZE = Values("a whole number above 0, or null", optional(is_size))
SIZES = Values("a list of whole numbers above 0", list_of(is_size))
NUMBERS = Values("a list of numbers", all_of(is_number))
FLAG = Values("true or false", is_flag)
FLAGS = Values("a list of true or false", all_of(is_flag))
RequiredRule = tuple[Any, Values]


def checked_options(raw: Mapping[str, object], rules: Mapping[str, RequiredRule], of: str = "") -> dict[str, Any]:
    """Return the options with rules, over the defaults of their class; other options are ignored.

    Args:
        raw: The content of config.json, or a part of it.
        rules: The rule of every option that has a say.
        of: The part's name in front of an option, with a dot.

    Returns:
        The values.

    Raises:
        RefusedOption: A value that breaks its rule.
    """
    options = {name: raw.get(name, default) for name, (default, _) in rules.items()}
    for name, (_, values) in rules.items():
        if not values(options[name]):
            raise RefusedOption(f"{of}{name}", options[name], values.words)
    return options


def known_options(
    raw: Mapping[str, object], rules: Mapping[str, Rule], without_effect: Iterable[str]
) -> dict[str, Any] | None:
    """Return a configuration over the defaults of its class.

    Args:
        raw: The content of config.json; names that begin with an underscore are about the file.
        rules: The rule of every option that has a say in the tensors.
        without_effect: The options that have none.

    Returns:
        The values of the options with rules; None if an option is in neither list, or its value breaks its rule.

    Raises:
        RefusedOption: A value that breaks a rule with Values.
    """
    checked_options(raw, {name: (default, test) for name, (default, test) in rules.items() if isinstance(test, Values)})
    given = {name: value for name, value in raw.items() if name[:1] != "_" and name not in without_effect}
    options = {name: default for name, (default, _) in rules.items()} | given
    if options.keys() != rules.keys() or not all(test(options[name]) for name, (_, test) in rules.items()):
        return None
    return options


def per_level(options: Mapping[str, Any], levels: int, names: Iterable[str]) -> dict[str, list[Any]] | None:
    """Return a list with one value for each level of a network, by option; None if a list has another length."""
    found = {name: value if isinstance(value := options[name], list) else [value] * levels for name in names}
    return found if all(len(value) == levels for value in found.values()) else None
