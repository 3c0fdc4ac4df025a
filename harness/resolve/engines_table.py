"""What the engines can run, and how each names its attention; readable without torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata

from harness import __version__
from harness.config.engines import CACHE_DIT as CACHE_DIT
from harness.config.engines import DIFFUSERS as DIFFUSERS
from harness.config.engines import ENGINES
from harness.config.engines import NATIVE as NATIVE
from harness.config.engines import ON_DIFFUSERS as ON_DIFFUSERS
from harness.config.engines import SGLANG as SGLANG
from harness.config.schema import RunConfig
from harness.resolve.checkpoint_defaults import PUBLISHED_FAMILY
from models.registry import resolve_backend


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
    entry = ENGINES[name]
    if entry.package and importlib.util.find_spec(entry.package) is None:
        raise ValueError(f"engine={name} needs {entry.install or entry.package}; or use engine={DIFFUSERS}")


def baseline_attention(config: RunConfig) -> str:
    """Return the attention backend of a baseline engine under the name it has there.

    Args:
        config: The configuration.

    Returns:
        The backend's name in diffusers or SGLang-Diffusion, or that of the configuration for another engine.

    Raises:
        ValueError: The backend is unknown, not installed, or not available in the baseline engine.
    """
    requested = config.attention.backend
    backend, own = resolve_backend(requested), ENGINES[config.engine.name].attention
    if own is not None:
        if requested not in own:
            raise ValueError(
                f"attention={requested} does not run in engine={config.engine.name}; choose {', '.join(own)}"
            )
        return requested
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
        return metadata.version(ENGINES[name].package or name)
    except metadata.PackageNotFoundError:
        return ""
