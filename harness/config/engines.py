"""Engines by name: what each needs, and what builds the stages of one that is not this project's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from schedulers.registry import Registry, Target


@dataclass(frozen=True)
class EngineEntry:
    """One engine.

    Attributes:
        make: MakeStages (harness.pipeline.composed): the function that builds its stages; empty for the native engine.
        package: Module that it needs; empty for none.
        install: What to install for that, in words.
        attention: Attention backends that it runs with. None = what its pipeline has (harness.resolve.engines_table).
        architectures: Architectures that it runs; None for all.
        approximate: Whether its images differ from the native engine's by more than rounding.
    """

    make: Target
    package: str = ""
    install: str = ""
    attention: tuple[str, ...] | None = ("auto",)
    architectures: tuple[str, ...] | None = None
    approximate: bool = False


ENGINES: Registry[EngineEntry] = Registry("engine", "engine.name", "engine")
"""Engines by name."""


def register_engine(
    name: str,
    make: Target,
    *,
    package: str = "",
    install: str = "",
    attention: tuple[str, ...] | None = ("auto",),
    architectures: tuple[str, ...] | None = None,
    approximate: bool = False,
    options: type[Any] | None = None,
) -> None:
    """Register a baseline engine, for engine.name. It runs on one rank and shares no forwards.

    Args:
        name: The engine's name.
        make: MakeStages (harness.pipeline.composed): the function that builds its stages.
        package: Module that it needs; empty for none.
        install: What to install for that, in words.
        attention: Attention backends that it runs with.
        architectures: Architectures that it runs; None for all.
        approximate: Whether its images differ from the native engine's by more than rounding.
        options: Dataclass of its options.
    """
    entry = EngineEntry(make, package, install, attention, architectures, approximate)
    ENGINES.register(name, entry, options=options, layouts=None if name == NATIVE else (), step_batching=name == NATIVE)


NATIVE, DIFFUSERS, CACHE_DIT, SGLANG = "native", "diffusers", "cache_dit", "sglang"
ON_DIFFUSERS = (DIFFUSERS, CACHE_DIT, SGLANG)
"""The engines that are diffusers' own pipeline, or parts of it."""
STAGES = "harness.baselines.build:baseline_stages"

register_engine(NATIVE, "")
register_engine(DIFFUSERS, STAGES, attention=None)
register_engine(
    CACHE_DIT,
    STAGES,
    attention=None,
    package="cache_dit",
    install="the package cache-dit: pip install 'triptych[cache_dit]'",
)
register_engine(
    SGLANG,
    STAGES,
    attention=None,
    package="sglang",
    install="the package sglang: pip install --no-deps sglang==0.5.23, and what it imports (the README lists it), "
    "since its own requirements would replace torch and diffusers",
)
