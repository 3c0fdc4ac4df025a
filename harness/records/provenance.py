"""Where a number comes from: code, versions, hardware, threads and the relevant environment variables."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import msgspec

from harness.messages import EngineInfo

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "numpy",
    "hydra-core",
    "pyzmq",
    "wandb",
    "imageio-ffmpeg",
    "ftfy",  # if it is installed, it repairs Wan's prompts
)
VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MKL_CBWR",
    "CUDA_VISIBLE_DEVICES",
    "NCCL_DEBUG",
    "PYTORCH_CUDA_ALLOC_CONF",
)


class Git(msgspec.Struct, frozen=True):
    """The code: its commit, and whether the working tree differed from it."""

    commit: str
    dirty: bool


class Hardware(msgspec.Struct, frozen=True):
    """The machine of rank 0; `device` is the device of its ranks."""

    platform: str
    cpu: str
    cores: int
    memory_mib: int
    device: str


class Provenance(msgspec.Struct, frozen=True):
    """Where a record comes from.

    `git` is null outside a checkout of this project. `hosts` are the names of the machines, one per node (a torchrun
    agent).
    """

    git: Git | None
    python: str
    packages: dict[str, str | None]
    hardware: Hardware
    world_size: int
    threads_per_rank: int
    environment: dict[str, str]
    timing: str
    hosts: list[str] = []


def provenance(engine: EngineInfo, environment: dict[str, str]) -> Provenance:
    """Collect the origin of a record.

    Args:
        engine: What the ranks report about themselves.
        environment: The ranks' environment variables.

    Returns:
        The provenance.
    """
    return Provenance(
        git=git_state(Path(__file__).parent),
        python=platform.python_version(),
        packages={name: version(name) for name in PACKAGES},
        hardware=Hardware(
            platform=platform.platform(),
            cpu=cpu_name(),
            cores=usable_cores(),
            memory_mib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
            device=engine.device,
        ),
        world_size=engine.world_size,
        threads_per_rank=engine.threads,
        environment={name: environment[name] for name in VARIABLES if name in environment},
        timing="device synchronised at the edges of every stage, step and network evaluation",
        hosts=engine.hosts,
    )


def git_state(folder: Path) -> Git | None:
    """Return the commit and whether the tree differs from it; None outside a checkout of this project."""
    try:
        if Path(_git(folder, "rev-parse", "--show-toplevel")) != folder.parent.resolve():
            return None  # an installed copy inside somebody else's checkout
        commit = _git(folder, "rev-parse", "HEAD")
        return Git(commit, bool(_git(folder, "status", "--porcelain")))
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    """Return the processor's name as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version(name: str) -> str | None:
    """Return the installed version of a package, or None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
