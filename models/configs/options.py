"""What the options of a library's config.json may be, so that a table of tensors holds for them; without torch.

A rule is the library's default, and a test of values. A configuration outside of the rules has no table here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

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
    """
    given = {name: value for name, value in raw.items() if name[:1] != "_" and name not in without_effect}
    options = {name: default for name, (default, _) in rules.items()} | given
    if options.keys() != rules.keys() or not all(test(options[name]) for name, (_, test) in rules.items()):
        return None
    return options


def per_level(options: Mapping[str, Any], levels: int, names: Iterable[str]) -> dict[str, list[Any]] | None:
    """Return a list with one value for each level of a network, by option; None if a list has another length."""
    found = {name: value if isinstance(value := options[name], list) else [value] * levels for name in names}
    return found if all(len(value) == levels for value in found.values()) else None
