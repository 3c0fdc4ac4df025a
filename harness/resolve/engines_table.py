"""Which engines there are, what a peer runs, and what its attention is called; readable without torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata

from harness.config.schema import RunConfig
from harness.resolve.checkpoint_defaults import PUBLISHED_FAMILY
from models.registry import nearest, resolve_backend

NATIVE, DIFFUSERS, CACHE_DIT, SGLANG = "native", "diffusers", "cache_dit", "sglang"
ENGINES = (NATIVE, DIFFUSERS, CACHE_DIT, SGLANG)
INSTALL_HINTS = {
    CACHE_DIT: "the package cache-dit: pip install 'triptych[cache_dit]'",
    SGLANG: "the package sglang: pip install --no-deps sglang==0.5.23, and what it imports (the README lists it), "
    "since its own requirements would replace torch and diffusers",
}
"""What an engine wants installed, by its module's name, which is the engine's own."""

PACKAGE = "triptych"


@dataclass(frozen=True)
class SglangRow:
    """How SGLang-Diffusion's stages are asked for an architecture.

    Args:
        config: module and class of its pipeline's configuration, in its package of those.
        attention: from a backend's name here to the name of what then runs there.
        encodings: how many text encodings it counts, of which its network reads the last.
        no_guidance: the scale that it takes for none.
        renamed: names in config.json that it reads, by those under which the same values are published.
    """

    config: str
    attention: Mapping[str, str]
    encodings: int = 1
    no_guidance: float = 1.0
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BaselineRow:
    """How diffusers runs an architecture.

    Args:
        module: its `load` builds the pipeline.
        attention: from a backend's name here to the name of what then runs there.
        families: of noise schedulers that fit its pipeline; None = all, since it scales noise and network input as it
            is told.
        cached: cache-dit knows the blocks of its network, which no U-Net's are.
        sglang: how SGLang-Diffusion runs it; None where that is not known to draw diffusers' picture.
    """

    module: str
    attention: Mapping[str, str]
    families: tuple[str, ...] | None
    cached: bool = True
    sglang: SglangRow | None = None


DISPATCHED = {"sdpa": "native", "math": "_native_math", "flash": "_native_flash", "flex": "flex"}
"""Names of diffusers' attention dispatch."""
DISPATCHED_MASKED = {name: there for name, there in DISPATCHED.items() if name != "flash"}
"""Those of layers that tell it a mask where prompts differ in length, which the flash kernel does not take."""
DIRECT = {"sdpa": "sdpa", "math": "sdpa_math", "flash": "sdpa_flash"}
"""Layers that call PyTorch's attention themselves: its own choice, or one of its kernels."""
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
    "sd": BaselineRow("harness.baselines.families.sd", DIRECT, None, cached=False),
    "sdxl": BaselineRow("harness.baselines.families.sdxl", DIRECT, None, cached=False),
}


def refuse_unknown_engine(name: str) -> None:
    """Refuses an engine that does not run here, or whose package is not installed.

    Raises:
        ValueError: what to choose, or to install, in one line.
    """
    if name not in ENGINES:
        raise ValueError(f"engine={name} is unknown{nearest(name, ENGINES)}; choose {' or '.join(ENGINES)}")
    if name in INSTALL_HINTS and importlib.util.find_spec(name) is None:
        raise ValueError(f"engine={name} needs {INSTALL_HINTS[name]}; or use engine={DIFFUSERS}")


def baseline_attention(config: RunConfig) -> str:
    """The attention of a peer, by the name that it has there.

    Raises:
        ValueError: a backend that is unknown, not installed, or that the peer cannot run.
    """
    asked = config.attention.backend
    backend = resolve_backend(asked)
    row, where = BASELINES[config.model.architecture], "diffusers' pipeline"
    names = row.attention
    if config.engine.name == SGLANG and row.sglang is not None:
        names, where = row.sglang.attention, "SGLang-Diffusion's network"
    if backend not in names:
        raise ValueError(
            f"attention={asked} does not run in {where} of model={config.model.name}; "
            f"choose {', '.join(('auto', *names))}, or engine=native"
        )
    return names[backend]


def engine_version(name: str) -> str:
    """The version of an engine's package, empty where it is not installed."""
    try:
        return metadata.version(PACKAGE if name == NATIVE else name)
    except metadata.PackageNotFoundError:
        return ""
