"""Whether the value of every key is one of its words and in its range, as `schedulers.options.option` declares them.

Which options go together is not asked here. Nothing is imported that a launcher does not have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from harness.config.schema import RunConfig
from models.registry import did_you_mean
from schedulers.options import Option, option_of
from schedulers.registry import Names


def check_options(config: RunConfig) -> None:
    """Refuse a word that a key does not have, and a number that is not finite or out of range.

    Args:
        config: The configuration as composed; null stands for a default and is not checked.

    Raises:
        ValueError: A value is wrong; one line has the key, the value and what to give instead.
    """
    for key, declared, value in options(config):
        _check(key, declared, value)


def options(node: Any, prefix: str = "") -> Iterator[tuple[str, Option, Any]]:
    """Yield every key below a dataclass with its declaration and its value, groups left out.

    Args:
        node: A dataclass whose fields are declared by `option` or `group`.
        prefix: Name of the dataclass in the configuration, with a dot at its end.

    Yields:
        The full name of the key, its declaration and its value.
    """
    for declared in fields(node):
        key, value = prefix + declared.name, getattr(node, declared.name)
        if is_dataclass(value):
            yield from options(value, f"{key}.")
        elif isinstance(value, dict) and any(is_dataclass(entry) for entry in value.values()):
            for name, entry in value.items():
                yield from options(entry, f"{key}.{name}.")
        elif isinstance(value, list) and value and is_dataclass(value[0]):
            for number, entry in enumerate(value):
                yield from options(entry, f"{key}[{number}].")
        else:
            yield key, option_of(declared), value


def _check(key: str, declared: Option, value: Any) -> None:
    for one in value if isinstance(value, list | tuple) else [value]:
        if one is None or isinstance(one, bool):
            continue
        word = one.name if isinstance(one, Enum) else one
        if (declared.words or isinstance(declared.words, Names)) and word not in declared.words:
            names = [str(name) for name in declared.words]
            if not names:
                raise ValueError(f"{key}={word}: no plug-in of this run has one; add plugins=[MODULE]")
            raise ValueError(f"{key}={word} is not one of {', '.join(names)}{did_you_mean(str(word), names)}")
        if isinstance(one, int | float) and not declared.words and not declared.fits(one):
            wanted = [] if math.isfinite(one) and declared.range else ["a finite number"]
            wanted += [declared.range] if declared.range else []
            unit = f" {declared.unit}" if declared.unit else ""
            raise ValueError(f"{key}={one}; give {', '.join(wanted)}{unit}")
