"""The imports of a rank, done before ranks are forked or as they start, limited to what its configuration needs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from types import ModuleType

from harness.config.engines import NATIVE, ON_DIFFUSERS
from harness.config.schema import RunConfig
from harness.parallel.mesh import degrees, world_size
from harness.resolve.engines_table import BASELINES
from models.registry import ARCHITECTURES

EAGER_PACKAGES = ("diffusers.models.autoencoders", "diffusers.models.transformers", "diffusers.models.unets")
"""Packages of diffusers that import all of their modules, every network that it has, to provide one of them."""


def import_required(config: RunConfig) -> None:
    """Import the modules that a rank of this configuration needs, with everything that they import.

    The native networks need a few modules of diffusers and import only those; a baseline engine's pipeline imports what
    it needs.
    """
    with without_siblings() if config.engine.name == NATIVE else nullcontext():
        for module in required_modules(config):
            importlib.import_module(module)


def required_modules(config: RunConfig) -> list[str]:
    """Return the modules whose imports bring in everything else."""
    architecture = config.model.architecture
    modules = ["harness.engines.loader", "harness.serving.continuous_batching", "harness.serving.request_scheduler"]
    if architecture in ARCHITECTURES:  # an agent does not know one of a plug-in, which its ranks load
        modules += [ARCHITECTURES[architecture].module]
    if config.engine.name != NATIVE:
        modules += ["harness.build.baseline"]
    if config.engine.name in ON_DIFFUSERS:
        modules += [BASELINES[architecture].module]
    if world_size(degrees(config.parallel)) > 1:
        modules += ["harness.parallel.vae"]
    return modules


def fill_tables() -> None:
    """Fill the tables that libraries make at their first use, so that forked ranks have them.

    transformers compiles a thousand regular expressions to name the weights of its encoders: half of what loading the
    built-in model takes.
    """
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("t5")


@contextmanager
def without_siblings() -> Iterator[None]:
    """Import a module of EAGER_PACKAGES without its siblings while this context is active.

    Empty packages replace them meanwhile. A later import of one of them gets the real package, with the same modules in
    it.

    Importing the packages as well costs a rank 0.20 s of 4.2 s of processor time (0.29 to 0.33 s of wall time in three
    runs), 152 modules and 14 MiB (2 cores, the emoji model). No other way was found that reads a module of a package
    without the package's `__init__.py`: loading its file by path enters sys.modules by hand too.
    """
    importlib.import_module("diffusers.models")
    empty_packages = {name: _empty_package(name) for name in EAGER_PACKAGES if name not in sys.modules}
    sys.modules.update(empty_packages)
    try:
        yield
    finally:
        for name in empty_packages:
            del sys.modules[name]


def _empty_package(name: str) -> ModuleType:
    """Return a package that finds its modules and contains none."""
    package, spec = ModuleType(name), find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package.__spec__, package.__path__ = spec, spec.submodule_search_locations
    return package
