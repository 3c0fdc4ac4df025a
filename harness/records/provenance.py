"""Where a number comes from: code, versions, hardware, threads and the relevant environment variables."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import msgspec

from harness import __version__
from harness.config.schema import PluginSource
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
ARITHMETIC_PREFIXES = (
    *("ATEN_", "DNNL_", "ONEDNN_", "MKL_", "OPENBLAS_", "BLIS_", "NPY_", "KMP_", "OMP_", "GOMP_"),
    *("CUDA_", "CUBLAS_", "CUBLASLT_", "CUDNN_", "NVIDIA_", "HIP_", "ROCM_", "ROCR_", "MIOPEN_", "TORCH_", "PYTORCH_"),
)
ARITHMETIC_NAMES = ("LD_PRELOAD", "LD_LIBRARY_PATH", "GLIBC_TUNABLES")  # another libm or BLAS, or another variant of it
SET_BY_LAUNCH = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR")  # by harness.engines.environment, from launch.*
SPEED_ONLY = (
    *("OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "OMP_DISPLAY_", "OMP_STACKSIZE", "KMP_AFFINITY"),
    *("KMP_BLOCKTIME", "KMP_SETTINGS", "GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY", "MKL_VERBOSE", "DNNL_VERBOSE"),
    *("ONEDNN_VERBOSE", "CUDA_HOME", "CUDA_PATH", "CUDA_CACHE_", "CUDA_LAUNCH_BLOCKING", "NVIDIA_VISIBLE_DEVICES"),
    *("NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_REQUIRE_", "TORCH_HOME", "TORCH_LOGS", "TORCH_NCCL_", "TORCH_CPP_LOG_"),
    *("TORCH_SHOW_CPP_", "TORCH_DISTRIBUTED_DEBUG", "TORCH_CUDA_ARCH_LIST", "PYTORCH_CUDA_ALLOC_", "PYTORCH_ALLOC_"),
)
"""Beginnings of variables that change no float: they set speed, memory or messages, or torchrun sets them."""
SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")
RECORDED_PREFIXES = (*ARITHMETIC_PREFIXES, "MALLOC_", "NCCL_", "GLOO_", "TORCHINDUCTOR_", "TRITON_", "TRIPTYCH_")
NOT_RECORDED = ("TRIPTYCH_SOCKETS", "TRIPTYCH_OWNER", "TORCH_NCCL_ASYNC_ERROR_HANDLING")  # set by each launch
ROOT = Path(__file__).parents[2]
SOURCES = ("conf", "harness", "models", "schedulers")
SOURCE_SUFFIXES = (".py", ".yaml", ".json", ".html", ".css", ".js")


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


class Cpu(msgspec.Struct, frozen=True):
    """The instruction set of PyTorch's CPU kernels on rank 0, and the vector instructions of the processor."""

    capability: str
    flags: list[str]


class Beginning(msgspec.Struct, frozen=True):
    """What is noted before a run does anything.

    Attributes:
        started: Time, UTC, ISO 8601.
        command: The command line; values of secrets are left out.
        sources_sha256: Hash of the sources and configuration files of the four packages as they are on disk.
    """

    started: str
    command: list[str]
    sources_sha256: str

    @classmethod
    def now(cls) -> Beginning:
        """Note the time, the command line and the sources."""
        return cls(utc_now(), [without_secret(part) for part in sys.orig_argv], sources_hash())


class PluginRow(msgspec.Struct, frozen=True):
    """A plug-in of a run: its name, the version of its package, and a hash of its source files."""

    name: str
    version: str
    sha256: str


class Provenance(msgspec.Struct, frozen=True):
    """Where a record comes from.

    Attributes:
        git: The commit; None outside a checkout of this project.
        python: Version of Python.
        packages: Versions of packages, this one's first; None if one is not installed.
        hardware: The machine of rank 0.
        world_size: Number of ranks.
        threads_per_rank: CPU threads of each rank.
        environment: Environment variables of the ranks that may matter, without secrets.
        timing: How times are taken.
        hosts: Names of the machines, one per node (a torchrun agent).
        started: Time at which the run began, UTC, ISO 8601; empty in a record from before it was written.
        ended: Time at which the record was made.
        command: The command line; values of secrets are left out.
        sources_sha256: Hash of the sources and configuration files when the run began: it differs from another run's
            after any edit, committed or not.
        cpu: The instruction set; None in a record from before it was written.
        plugins: The plug-ins of the run.
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
    started: str = ""
    ended: str = ""
    command: list[str] = []
    sources_sha256: str = ""
    cpu: Cpu | None = None
    plugins: list[PluginRow] = []

    @property
    def machine(self) -> tuple[str, str, str]:
        """The processor, its instruction set, and the device: what two runs share if their times may be compared."""
        return self.hardware.cpu, "" if self.cpu is None else self.cpu.capability, self.hardware.device


def provenance(
    engine: EngineInfo,
    environment: dict[str, str],
    beginning: Beginning | None = None,
    plugins: Mapping[str, PluginSource] | None = None,
) -> Provenance:
    """Collect the origin of a record.

    Args:
        engine: What the ranks report about themselves.
        environment: The ranks' environment variables.
        beginning: What was noted before the run; None notes it now.
        plugins: The code of the run's plug-ins, by name.

    Returns:
        The provenance.
    """
    beginning = beginning or Beginning.now()
    return Provenance(
        git=git_state(ROOT),
        python=platform.python_version(),
        packages={"triptych": __version__, **{name: version(name) for name in PACKAGES}},
        hardware=Hardware(
            platform=platform.platform(),
            cpu=cpu_name(),
            cores=usable_cores(),
            memory_mib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
            device=engine.device,
        ),
        world_size=engine.world_size,
        threads_per_rank=engine.threads,
        environment={name: value for name, value in sorted(environment.items()) if is_recorded(name)},
        timing="device synchronised at the edges of every stage, step and network evaluation",
        hosts=engine.hosts,
        started=beginning.started,
        ended=utc_now(),
        command=beginning.command,
        sources_sha256=beginning.sources_sha256,
        cpu=Cpu(engine.cpu_capability or cpu_capability(), vector_flags()),
        plugins=[PluginRow(name, source.version, source.sha256) for name, source in (plugins or {}).items()],
    )


def git_state(folder: Path) -> Git | None:
    """Return the commit and whether the tree differs from it.

    Args:
        folder: Folder of the packages.

    Returns:
        The state, or None if the folder is not the top of a checkout.
    """
    try:
        if Path(_git(folder, "rev-parse", "--show-toplevel")) != folder.resolve():
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


def arithmetic_environment() -> dict[str, str]:
    """Return what can change a float besides code, packages, weights and configuration.

    These are the instruction set that PyTorch chooses, the processor's vector instructions, the GPUs with their driver,
    and the environment variables of the libraries. Variables that a launch sets itself (threads, MKL_CBWR) are left
    out, because the configuration decides them. So the answer is the same under torchrun.

    Returns:
        A value for `cpu_capability`, `cpu_flags`, `gpus`, `gpu_driver`, and for each variable that is set.
    """
    gpus, driver = nvidia_gpus()
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(ARITHMETIC_PREFIXES) or name in ARITHMETIC_NAMES
        if name not in SET_BY_LAUNCH and not name.startswith(SPEED_ONLY) and not is_secret(name)
    }
    flags = " ".join(vector_flags())
    return {"cpu_capability": cpu_capability(), "cpu_flags": flags, "gpus": gpus, "gpu_driver": driver, **variables}


def is_recorded(name: str) -> bool:
    """Return whether an environment variable belongs into a record."""
    wanted = name.startswith(RECORDED_PREFIXES) or name in ARITHMETIC_NAMES
    return wanted and name not in NOT_RECORDED and not is_secret(name)


def without_secret(argument: str) -> str:
    """Return an argument of a command line, without its value if its key names a secret."""
    key, equals, _ = argument.partition("=")
    last = key.replace("-", ".").replace("_", ".").rpartition(".")[2]
    return f"{key}=..." if equals and last.upper() in SECRETS else argument


def utc_now() -> str:
    """Return the time, UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def sources_hash(root: Path = ROOT) -> str:
    """Return a hash over the names and contents of the packages' sources and configuration files.

    Args:
        root: Folder of the packages.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for package in SOURCES:
        files = (file for file in (root / package).rglob("*") if file.suffix in SOURCE_SUFFIXES)
        for file in sorted(files):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def is_secret(name: str) -> bool:
    """Return whether a variable's name says that its value must not be shown."""
    return any(word in name.upper() for word in SECRETS)


def cpu_capability() -> str:
    """Return the instruction set of PyTorch's CPU kernels in a process with this environment, without PyTorch.

    Source: `compute_cpu_capability` in PyTorch's aten/src/ATen/native/DispatchStub.cpp, for x86. On other processors
    the answer is DEFAULT.

    Returns:
        AVX512, AVX2 or DEFAULT, as `torch.backends.cpu.get_cpu_capability` writes it.
    """
    forced = os.environ.get("ATEN_CPU_CAPABILITY")
    flags = cpu_flags()
    if forced in ("avx512", "avx2", "default") and (forced == "default" or platform.machine() in ("x86_64", "AMD64")):
        return forced.upper()
    if {"avx512vl", "avx512bw", "avx512dq", "fma"} <= flags:
        return "AVX512"
    return "AVX2" if {"avx2", "fma"} <= flags else "DEFAULT"


def vector_flags() -> list[str]:
    """Return the processor's vector and matrix instructions, sorted."""
    names = ("avx", "fma", "amx", "f16c", "sve", "asimd", "bf16", "i8mm")
    return sorted(flag for flag in cpu_flags() if flag.startswith(names))


def cpu_flags() -> set[str]:
    """Return the instruction flags of the first processor; empty where the kernel lists none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def nvidia_gpus(root: Path = Path("/proc/driver/nvidia")) -> tuple[str, str]:
    """Return the models of the machine's NVIDIA GPUs and the driver's version, as the kernel's module lists them.

    Args:
        root: Folder of the module.

    Returns:
        The models, sorted and joined by commas, and the version's line; empty without a GPU.
    """
    try:
        files = [file.read_text() for file in root.glob("gpus/*/information")]
        driver = (root / "version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "", ""
    models = sorted(line.split(":", 1)[1].strip() for text in files for line in text.splitlines() if "Model:" in line)
    return ", ".join(models), driver


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
