"""Which engines there are, what a peer runs, and what its attention is called; readable without torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from harness.config.schema import RunConfig
from models.registry import nearest, resolve_backend

NATIVE, DIFFUSERS = "native", "diffusers"
ENGINES = (NATIVE, DIFFUSERS)
NAMED = {"sglang": ("sglang", "'sglang[diffusion]'"), "cache_dit": ("cache_dit", "cache-dit")}
"""Engines that a configuration may name and nothing here runs: the module, and what pip installs."""

PACKAGE = "triptych"


@dataclass(frozen=True)
class PeerRow:
    """How diffusers runs an architecture.

    Args:
        module: its `load` builds the pipeline.
        attention: from a backend's name here to the name of what then runs there.
        scales: its pipeline scales noise and network input as the noise scheduler says; else only a noise scheduler
            that scales neither fits it.
    """

    module: str
    attention: Mapping[str, str]
    scales: bool = False


DISPATCHED = {"sdpa": "native", "math": "_native_math", "flash": "_native_flash", "flex": "flex"}
"""Names of diffusers' attention dispatch."""
DIRECT = {"sdpa": "sdpa", "math": "sdpa_math", "flash": "sdpa_flash"}
"""Layers that call PyTorch's attention themselves: its own choice, or one of its kernels."""
MASKED = {"sdpa": "sdpa", "math": "sdpa_math"}
"""Those that also tell it a mask, which the flash kernel does not take."""

PEERS = {
    "dit": PeerRow("harness.peer.families.dit", DIRECT),
    "pixart": PeerRow("harness.peer.families.pixart", MASKED, scales=True),
    "sd3": PeerRow("harness.peer.families.sd3", DIRECT),
    "flux": PeerRow("harness.peer.families.flux", DISPATCHED),
    "qwen_image": PeerRow("harness.peer.families.qwen_image", DISPATCHED),
    "z_image": PeerRow("harness.peer.families.z_image", DISPATCHED),
    "wan": PeerRow("harness.peer.families.wan", DISPATCHED),
    "sd": PeerRow("harness.peer.families.sd", DIRECT, scales=True),
    "sdxl": PeerRow("harness.peer.families.sdxl", DIRECT, scales=True),
}


def refuse_unknown_engine(name: str) -> None:
    """Refuses an engine that does not run here.

    Raises:
        ValueError: what to choose, or to install, in one line.
    """
    if name in ENGINES:
        return
    if name not in NAMED:
        raise ValueError(f"engine={name} is unknown{nearest(name, ENGINES)}; choose {' or '.join(ENGINES)}")
    module, wheel = NAMED[name]
    lacking = (
        f"the package {module} is not installed (pip install {wheel}), and "
        if importlib.util.find_spec(module) is None
        else ""
    )
    raise ValueError(f"engine={name}: {lacking}this version has no adapter for it; choose {' or '.join(ENGINES)}")


def resolved_attention(config: RunConfig) -> str:
    """The attention of a peer, by the name that it has there.

    Raises:
        ValueError: a backend that is unknown, not installed, or that the peer cannot run.
    """
    asked = config.attention.backend
    backend = resolve_backend(asked)
    names = PEERS[config.model.architecture].attention
    if backend not in names:
        raise ValueError(
            f"attention={asked} does not run in diffusers' pipeline of model={config.model.name}; "
            f"choose {', '.join(('auto', *names))}, or engine=native"
        )
    return names[backend]


def engine_version(name: str) -> str:
    """The version of an engine's package, empty where it is not installed."""
    try:
        return metadata.version(PACKAGE if name == NATIVE else name)
    except metadata.PackageNotFoundError:
        return ""
