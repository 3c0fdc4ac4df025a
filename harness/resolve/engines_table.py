"""The engines, what each baseline engine can run, and how it names its attention; readable without torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata

from harness import __version__
from harness.config.schema import RunConfig
from harness.resolve.checkpoint_defaults import PUBLISHED_FAMILY
from models.registry import resolve_backend

NATIVE, DIFFUSERS, CACHE_DIT, SGLANG = "native", "diffusers", "cache_dit", "sglang"
INSTALL_HINTS = {
    CACHE_DIT: "the package cache-dit: pip install 'triptych[cache_dit]'",
    SGLANG: "the package sglang: pip install --no-deps sglang==0.5.23, and what it imports (the README lists it), "
    "since its own requirements would replace torch and diffusers",
}
"""How to install what an engine needs, by the engine's name, which is also the name of its module."""


@dataclass(frozen=True)
class SglangRow:
    """How an architecture is requested from SGLang-Diffusion's stages.

    Attributes:
        config: Module and class of the pipeline's configuration, in SGLang's package of configurations.
        attention: The name of the backend that runs there, by the backend's name here.
        encodings: Number of text encodings that it counts; its network uses the last one.
        no_guidance: Guidance scale that it takes for no guidance.
        renamed: Names in config.json that it reads, by the names under which the same values are published.
    """

    config: str
    attention: Mapping[str, str]
    encodings: int = 1
    no_guidance: float = 1.0
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BaselineRow:
    """How diffusers runs an architecture.

    Attributes:
        module: Module whose `load` builds the pipeline.
        attention: The name of the backend that runs there, by the backend's name here.
        families: Noise-scheduler families that fit the pipeline. None = all, because it scales noise and network input
            as its scheduler says.
        sglang: How SGLang-Diffusion runs it; None if that is not known to make diffusers' image.
    """

    module: str
    attention: Mapping[str, str]
    families: tuple[str, ...] | None
    sglang: SglangRow | None = None


DISPATCHED = {"sdpa": "native", "math": "_native_math", "flash": "_native_flash", "flex": "flex"}
"""Backends of layers that use diffusers' attention dispatcher, with their names there."""
DISPATCHED_MASKED = {name: there for name, there in DISPATCHED.items() if name != "flash"}
"""Backends of dispatching layers that pass a mask if prompts differ in length, which the flash kernel cannot use."""
DIRECT = {"sdpa": "sdpa", "math": "sdpa_math", "flash": "sdpa_flash"}
"""Backends of layers that call PyTorch's attention directly: its own choice, or one of its kernels."""
DIRECT_MASKED = {name: there for name, there in DIRECT.items() if name != "flash"}
FLOWS = ("rectified_flow", PUBLISHED_FAMILY)

BASELINES = {
    "dit": BaselineRow("harness.baselines.families.dit", DIRECT, (*FLOWS, "ddpm")),
    "pixart": BaselineRow("harness.baselines.families.pixart", DIRECT_MASKED, None),
    "sd3": BaselineRow(
        "harness.baselines.families.sd3",
        DIRECT,
        FLOWS,
        sglang=SglangRow("stablediffusion3:StableDiffusion3PipelineConfig", DIRECT),
    ),
    "flux": BaselineRow(
        "harness.baselines.families.flux",
        DISPATCHED,
        FLOWS,
        sglang=SglangRow("flux:FluxPipelineConfig", DIRECT, encodings=2),
    ),
    "qwen_image": BaselineRow("harness.baselines.families.qwen_image", DISPATCHED_MASKED, FLOWS),
    "z_image": BaselineRow(
        "harness.baselines.families.z_image",
        DISPATCHED_MASKED,
        FLOWS,
        sglang=SglangRow(
            "zimage:ZImagePipelineConfig",
            DIRECT_MASKED,
            no_guidance=0.0,
            renamed={"n_layers": "num_layers", "n_heads": "num_attention_heads", "in_channels": "out_channels"},
        ),
    ),
    "wan": BaselineRow("harness.baselines.families.wan", DISPATCHED, FLOWS),
    "sd": BaselineRow("harness.baselines.families.sd", DIRECT, None),
    "sdxl": BaselineRow("harness.baselines.families.sdxl", DIRECT, None),
}


def refuse_missing_engine(name: str) -> None:
    """Refuse an engine whose package is not installed.

    Raises:
        ValueError: One line says what to install.
    """
    if name in INSTALL_HINTS and importlib.util.find_spec(name) is None:
        raise ValueError(f"engine={name} needs {INSTALL_HINTS[name]}; or use engine={DIFFUSERS}")


def baseline_attention(config: RunConfig) -> str:
    """Return the attention backend of a baseline engine under the name it has there.

    Args:
        config: The configuration.

    Returns:
        The backend's name in diffusers or SGLang-Diffusion.

    Raises:
        ValueError: The backend is unknown, not installed, or not available in the baseline engine.
    """
    requested = config.attention.backend
    backend = resolve_backend(requested)
    row, place = BASELINES[config.model.architecture], "diffusers' pipeline"
    names = row.attention
    if config.engine.name == SGLANG and row.sglang is not None:
        names, place = row.sglang.attention, "SGLang-Diffusion's network"
    if backend not in names:
        raise ValueError(
            f"attention={requested} does not run in {place} of model={config.model.name}; "
            f"choose {', '.join(('auto', *names))}, or engine=native"
        )
    return names[backend]


def engine_version(name: str) -> str:
    """Return the version of an engine's package, empty if it is not installed."""
    if name == NATIVE:
        return __version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
