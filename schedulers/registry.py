"""Names that a configuration can choose, each with what it stands for: ours, and those of plug-ins.

A `Registry` holds one kind, such as solvers. It needs only the standard library, and imports what an entry names in the
ranks that use it, so that a launcher stays free of PyTorch.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Generic, TypeAlias, TypedDict, TypeVar, overload

from schedulers.options import KEY

T = TypeVar("T")
Target: TypeAlias = str | Callable[..., Any]
"""What an entry makes something of: a callable, or `package.module:attribute`, which only ranks import."""
AXES = ("dp", "cfg", "tp", "ring", "ulysses", "pipe")
"""The axes of the mesh that a registration may name."""
OURS = "triptych"
"""The owner of what this project registers itself."""
REGISTRIES: list[Registry[Any]] = []
"""Every registry, in the order in which they were made."""

_owner: ContextVar[str] = ContextVar("owner", default=OURS)


class Common(TypedDict, total=False):
    """What a plug-in may say of every kind that it registers.

    Attributes:
        options: The dataclass of its keys, `plugin.<name>.<field>`, each declared by `schedulers.options.option`.
        layouts: The axes of the mesh that may be larger than 1 with it: dp, cfg, tp, ring, ulysses, pipe. None = all.
        step_batching: Whether several requests may share its forwards.
    """

    options: type[Any] | None
    layouts: Collection[str] | None
    step_batching: bool


@dataclass(frozen=True)
class Registration:
    """Who registered a name, and what it said besides its entry.

    Attributes:
        kind: The kind of its registry, such as solver.
        name: The name.
        owner: The plug-in that registered it; OURS for this project.
        options: The dataclass of its keys, `plugin.<name>.<field>`; None if it has none.
        layouts: The axes of the mesh that may be larger than 1 with it; None = all.
        step_batching: Whether several requests may share its forwards.
    """

    kind: str
    name: str
    owner: str = OURS
    options: type[Any] | None = None
    layouts: tuple[str, ...] | None = None
    step_batching: bool = True


class Registry(Collection[str], Generic[T]):
    """The names of one kind, in the order of their registration.

    Args:
        kind: The kind in words, such as solver.
        key: The configuration key that holds such a name, or a list of them; empty if a configuration names none.
        group: The group of conf/ whose option NAME chooses the name by itself, such as scheduler/solver.
    """

    def __init__(self, kind: str, key: str = "", group: str = "") -> None:
        self.kind = kind
        self.key = key
        self.group = group
        self._entries: dict[str, T] = {}
        self._registrations: dict[str, Registration] = {}
        REGISTRIES.append(self)

    def register(
        self,
        name: str,
        entry: T,
        *,
        options: type[Any] | None = None,
        layouts: Collection[str] | None = None,
        step_batching: bool = True,
    ) -> None:
        """Add a name.

        Args:
            name: The name, letters, digits and underscores.
            entry: What it stands for.
            options: The dataclass of its keys, each declared by `schedulers.options.option`.
            layouts: The axes of the mesh that may be larger than 1 with it; None = all.
            step_batching: Whether several requests may share its forwards.

        Raises:
            ValueError: The name is taken or malformed, or an option is not declared; one line says what to change.
        """
        owner = _owner.get()
        what = f"{self.kind} {name!r} of {owner}"
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"{what}: a name has letters, digits and underscores only")
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice, by {self.owner(name)} and {owner}; rename one")
        if options is not None:
            _check_options(what, name, options)
        axes = None if layouts is None else tuple(layouts)
        if unknown := sorted(set(axes or ()) - set(AXES)):
            raise ValueError(f"{what}: layouts names {unknown[0]!r}, which is not one of {', '.join(AXES)}")
        self._entries[name] = entry
        self._registrations[name] = Registration(self.kind, name, owner, options, axes, step_batching)

    def withdraw(self, owner: str) -> None:
        """Remove the names that an owner registered."""
        for name in [name for name in self._entries if self.owner(name) == owner]:
            del self._entries[name], self._registrations[name]

    def get(self, name: str) -> T:
        """Return the entry of a name. Raises KeyError if there is none."""
        return self._entries[name]

    __getitem__ = get

    def registration(self, name: str) -> Registration:
        """Return who registered a name, and with what. Raises KeyError if there is no such name."""
        return self._registrations[name]

    def owner(self, name: str) -> str:
        """Return who registered a name. Raises KeyError if there is no such name."""
        return self._registrations[name].owner

    def names(self) -> tuple[str, ...]:
        """Return all names."""
        return tuple(self._entries)

    def values(self) -> tuple[T, ...]:
        """Return all entries."""
        return tuple(self._entries.values())

    def items(self) -> tuple[tuple[str, T], ...]:
        """Return all names, each with its entry."""
        return tuple(self._entries.items())

    def registrations(self) -> tuple[Registration, ...]:
        """Return who registered each name, and with what."""
        return tuple(self._registrations.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Names(Sequence[str]):
    """Words and the names of registries one after another, up to date whenever they are read.

    Args:
        parts: Words, and registries or other collections of words.
    """

    def __init__(self, *parts: str | Collection[str]) -> None:
        self._parts = parts

    def _all(self) -> list[str]:
        found = [[part] if isinstance(part, str) else list(part) for part in self._parts]
        return list(dict.fromkeys(name for names in found for name in names))

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._all()[index]

    def __len__(self) -> int:
        return len(self._all())


@contextmanager
def owned_by(owner: str) -> Iterator[None]:
    """Register in the name of a plug-in inside the context; if it fails, nothing of it stays registered."""
    token = _owner.set(owner)
    try:
        yield
    except BaseException:
        withdraw(owner)
        raise
    finally:
        _owner.reset(token)


def withdraw(owner: str) -> None:
    """Remove what an owner registered in any registry."""
    for registry in REGISTRIES:
        registry.withdraw(owner)


def imported(target: Target) -> Any:
    """Return what a target means: an object itself, or the one that `package.module:attribute` names."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def registrations() -> list[Registration]:
    """Return who registered each name of every registry, and with what."""
    return [row for registry in REGISTRIES for row in registry.registrations()]


def plugin_options() -> dict[str, type[Any]]:
    """Return the dataclass of options of every registration that has one, by name."""
    return {row.name: row.options for row in registrations() if row.options is not None}


def _check_options(what: str, name: str, options: type[Any]) -> None:
    """Refuse options that are not declared, have no default, or would share their keys with another registration."""
    if not is_dataclass(options):
        raise ValueError(f"{what}: its options are no dataclass; write @dataclass above {options.__name__}")
    for declared in fields(options):
        if KEY not in declared.metadata or (declared.default is MISSING and declared.default_factory is MISSING):
            raise ValueError(
                f"{what}: option {declared.name!r} is not declared; write "
                f"{declared.name}: TYPE = option(DEFAULT, MEANING)"
            )
    if name in plugin_options():
        raise ValueError(f"{what}: the keys plugin.{name} belong to another kind with options; rename one")
