"""How an option of a configuration is declared: once, as a dataclass field whose metadata says what it may be.

    steps: int = option(20, "Number of solver steps.", low=1)

The checks, the key reference and the help read the same declaration. This module needs only the standard library.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")
KEY = "option"


@dataclass(frozen=True)
class Option:
    """What one option means and which values it may have.

    Attributes:
        meaning: One or two sentences for the user.
        unit: Unit of a number, such as ms.
        words: Allowed values, if there are only a few; empty if there are many.
        low: Smallest allowed number.
        high: Largest allowed number.
        above: Number that the value has to exceed.
        below: Number that the value has to stay under.
        infinite: Whether the value may be infinite besides.
        reads: Choices in which the option is used, such as task=plan; empty means those of the group around it.
    """

    meaning: str
    unit: str = ""
    words: Sequence[str | int] = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    infinite: bool = False
    reads: tuple[str, ...] = ()

    def fits(self, number: float) -> bool:
        """Return whether a number is finite and in the range, or infinite where it may be."""
        if not math.isfinite(number):
            return self.infinite and number == math.inf
        return (
            (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    @property
    def range(self) -> str:
        """The allowed numbers in words, such as `at least 1` or `0 to 1`; empty if all finite numbers are allowed."""
        limits = self._limits
        return f"{limits}, or inf" if limits and self.infinite and self.high is not None else limits

    @property
    def _limits(self) -> str:
        if self.low is not None and self.high is not None:
            between = "or" if isinstance(self.high, int) and self.high == self.low + 1 > 1 else "to"
            return f"{_plain(self.low)} {between} {_plain(self.high)}"
        bounds = (
            ("at least", self.low),
            ("more than", self.above),
            ("at most", self.high),
            ("less than", self.below),
        )
        return " and ".join(f"{words} {_plain(bound)}" for words, bound in bounds if bound is not None)


def _plain(number: float) -> str:
    return f"{number:d}" if isinstance(number, int) else f"{number:g}"


def option(
    default: T,
    meaning: str,
    *,
    unit: str = "",
    words: Sequence[str | int] | type[Enum] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    infinite: bool = False,
    reads: tuple[str, ...] = (),
) -> T:
    """Declare an option as the default of a dataclass field.

    Args:
        default: The field's default; a list or a dictionary is copied for each instance.
        meaning: One or two sentences for the user.
        unit: Unit of a number, such as ms.
        words: Allowed values, or the enum whose names they are; the enum of an enum default is found by itself. Names
            (schedulers.registry) are read anew each time.
        low: Smallest allowed number.
        high: Largest allowed number.
        above: Number that the value has to exceed.
        below: Number that the value has to stay under.
        infinite: Whether the value may be infinite besides.
        reads: Choices in which the option is used; empty means those of the group around it.

    Returns:
        The field, typed as its default.
    """
    names = tuple(member.name for member in words) if isinstance(words, type) else words
    if isinstance(default, Enum):
        names = tuple(member.name for member in type(default))
    declared = {KEY: Option(meaning, unit, names, low, high, above, below, infinite, reads)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=declared)
    return field(default=default, metadata=declared)


def group(factory: Callable[[], T], meaning: str, *, reads: tuple[str, ...] = ()) -> T:
    """Declare a group of options as the default of a dataclass field.

    Args:
        factory: The group's dataclass, or a function that makes one.
        meaning: One sentence for the user.
        reads: Choices in which the group's options are used, unless an option says otherwise.

    Returns:
        The field, typed as the group.
    """
    return field(default_factory=factory, metadata={KEY: Option(meaning, reads=reads)})


def option_of(declared: Field[Any]) -> Option:
    """Return what `option` or `group` declared about a dataclass field."""
    found: Option = declared.metadata[KEY]
    return found
