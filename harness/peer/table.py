"""Which engines there are, what a peer runs, and what its attention is called; readable without torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from harness.config.schema import RunConfig
from harness.config.trained import PUBLISHED_FAMILY
from models.registry import nearest, resolve_backend

NATIVE, DIFFUSERS, CACHE_DIT = "native", "diffusers", "cache_dit"
ENGINES = (NATIVE, DIFFUSERS, CACHE_DIT)
NAMED = {"sglang": ("sglang", "'sglang[diffusion]'")}
"""Engines that a configuration may name and nothing here runs: the module, and what pip installs."""

PACKAGE = "triptych"


@dataclass(frozen=True)
class PeerRow:
    """How diffusers runs an architecture.

    Args:
        module: its `load` builds the pipeline.
        attention: from a backend's name here to the name of what then runs there.
        families: of noise schedulers that fit its pipeline; None = all, since it scales noise and network input as it
            is told.
        cached: cache-dit knows the blocks of its network, which no U-Net's are.
    """

    module: str
    attention: Mapping[str, str]
    families: tuple[str, ...] | None
    cached: bool = True


DISPATCHED = {"sdpa": "native", "math": "_native_math", "flash": "_native_flash", "flex": "flex"}
"""Names of diffusers' attention dispatch."""
DISPATCHED_MASKED = {name: there for name, there in DISPATCHED.items() if name != "flash"}
"""Those of layers that tell it a mask where prompts differ in length, which the flash kernel does not take."""
DIRECT = {"sdpa": "sdpa", "math": "sdpa_math", "flash": "sdpa_flash"}
"""Layers that call PyTorch's attention themselves: its own choice, or one of its kernels."""
DIRECT_MASKED = {name: there for name, there in DIRECT.items() if name != "flash"}
FLOWS = ("rectified_flow", PUBLISHED_FAMILY)

PEERS = {
    "dit": PeerRow("harness.peer.families.dit", DIRECT, (*FLOWS, "ddpm")),
    "pixart": PeerRow("harness.peer.families.pixart", DIRECT_MASKED, None),
    "sd3": PeerRow("harness.peer.families.sd3", DIRECT, FLOWS),
    "flux": PeerRow("harness.peer.families.flux", DISPATCHED, FLOWS),
    "qwen_image": PeerRow("harness.peer.families.qwen_image", DISPATCHED_MASKED, FLOWS),
    "z_image": PeerRow("harness.peer.families.z_image", DISPATCHED_MASKED, FLOWS),
    "wan": PeerRow("harness.peer.families.wan", DISPATCHED, FLOWS),
    "sd": PeerRow("harness.peer.families.sd", DIRECT, None, cached=False),
    "sdxl": PeerRow("harness.peer.families.sdxl", DIRECT, None, cached=False),
}


def refuse_unknown_engine(name: str) -> None:
    """Refuses an engine that does not run here, or whose package is not installed.

    Raises:
        ValueError: what to choose, or to install, in one line.
    """
    if name == CACHE_DIT and importlib.util.find_spec(name) is None:
        raise ValueError(
            f"engine={name} needs the package cache-dit: pip install 'triptych[cache_dit]', or use engine={DIFFUSERS}"
        )
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


def peer_attention(config: RunConfig) -> str:
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
