"""What a rank imports, before ranks are forked or as they start, and nothing that its configuration has no use for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from types import ModuleType

from harness.config.schema import RunConfig
from harness.parallel.mesh import degrees, world_size
from harness.resolve.engines_table import NATIVE, PEERS
from models.registry import ARCHITECTURES

EAGER_PACKAGES = ("diffusers.models.autoencoders", "diffusers.models.transformers", "diffusers.models.unets")
"""Packages of diffusers that import all of their modules, every network that it has, to give one of them."""


def import_parts(config: RunConfig) -> None:
    """Imports the modules that a rank of this configuration needs, with all that they import.

    The native networks take a few modules of diffusers, and those alone; a peer's pipeline takes what it takes.
    """
    with modules_alone() if config.engine.name == NATIVE else nullcontext():
        for module in parts_of(config):
            importlib.import_module(module)


def parts_of(config: RunConfig) -> list[str]:
    """The modules that bring the rest."""
    architecture = config.model.architecture
    parts = ["harness.build.worker", "harness.serving.continuous_batching", ARCHITECTURES[architecture].module]
    if config.engine.name != NATIVE:
        parts += ["harness.build.baseline", PEERS[architecture].module]
    if world_size(degrees(config.parallel)) > 1:
        parts += ["harness.parallel.vae"]
    return parts


@contextmanager
def modules_alone() -> Iterator[None]:
    """Within it, importing a module of the packages above does not import its siblings.

    Packages without contents stand in their place meanwhile. Who imports one of them later has the real one, with the
    same modules in it.
    """
    importlib.import_module("diffusers.models")
    stand_ins = {name: _stand_in(name) for name in EAGER_PACKAGES if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _stand_in(name: str) -> ModuleType:
    """A package that finds its modules, and holds none."""
    package, spec = ModuleType(name), find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package.__spec__, package.__path__ = spec, spec.submodule_search_locations
    return package
