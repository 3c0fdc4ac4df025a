"""The outputs that a run is held to: which configurations make them, and their files, which later runs reuse."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from harness.client.generator import DiffusionGenerator
from harness.config.cache import CacheConfig
from harness.config.optimize import Optimize
from harness.config.schema import DType, EngineConfig, LaunchMode, ParallelConfig, Quantize, RunConfig, Task, TaskConfig
from harness.engines.pool import MakeEngine, new_engine
from harness.messages import Array
from harness.metrics.fidelity import Check
from harness.records.provenance import PACKAGES, arithmetic_environment, cpu_name, version
from harness.records.record import write_atomically
from harness.resolve.checkpoint import COMPONENTS
from harness.resolve.compose import ResolvedRun, to_dict
from harness.resolve.conflicts import check_conflicts
from harness.resolve.engine import check_engine
from harness.resolve.engine_key import BUILT_FROM
from harness.resolve.engines_table import BASELINES, DIFFUSERS
from harness.serving.faults import failure_line

CODE = (
    "models",
    "schedulers",
    "harness/baselines",
    "harness/build",
    "harness/caching",
    "harness/client",
    "harness/device",
    "harness/engines",
    "harness/messages.py",
    "harness/metrics",
    "harness/optimize",
    "harness/parallel",
    "harness/pipeline",
    "harness/plugins",
    "harness/resolve",
    "harness/serving",
    "harness/tasks/common",
)
"""Sources that an image may depend on, whatever the layout and the engine."""
OF_PROMPTS = ("prompt", "prompts", "seed", "samples_per_prompt", "batch_size")
"""Keys of a request that say which images are made, not how."""


@dataclass(frozen=True)
class GeneratedOutput:
    """The output of one request, one entry per image.

    Attributes:
        latents: Latents of each image, (1 or solver steps, *latent shape).
        pixels: Pixels of each image.
    """

    latents: list[Array]
    pixels: list[Array]

    @property
    def final_latents(self) -> list[Array]:
        """The latents after the last solver step, one per image."""
        return [latents[-1] for latents in self.latents]

    def same_bits(self, other: GeneratedOutput) -> bool:
        """Return whether every bit of both outputs is the same."""
        pairs = zip([*self.latents, *self.pixels], [*other.latents, *other.pixels], strict=True)
        return all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


@dataclass(frozen=True)
class ReferenceRenderer:
    """Generates references, each on its own engine.

    Attributes:
        folder: The run's folder; each engine has a folder inside it for its configuration and logs.
        bars: Progress display.
        make_engine: Function that returns an engine, new or still warm from an earlier job.
    """

    folder: Path
    bars: Progress
    make_engine: MakeEngine = new_engine

    def generate(self, config: RunConfig, role: str, requests: int = 1) -> GeneratedOutput:
        """Generate the output of a configuration.

        Args:
            config: Configuration of the output.
            role: Part that the output plays, which names the engine's folder.
            requests: Number of equal requests, of which the last one counts.

        Returns:
            The latents and pixels.

        Raises:
            RequestFailed: The engine answered with a typed error.
            EngineGone: A rank died, or was not ready in time.
        """
        task = self.bars.add_task(f"generating the {role}", total=None)
        run = ResolvedRun(config, [], self.folder / role.replace(" ", "_"), [])
        with DiffusionGenerator.from_resolved(run, run.folder, self.make_engine) as generator:
            for _ in range(requests):
                generation = generator.generate(latents="steps" if config.task.fidelity_per_step else "last")
        self.bars.remove_task(task)
        return GeneratedOutput(generation.latents, generation.pixels)


class References:
    """The kept outputs of a run's references; what is missing is generated.

    Args:
        run: The run that is held to them.
        renderer: Generator of outputs that are not kept yet.

    Attributes:
        generated: Roles that were generated now, since no file had them.
        notes: Remarks for the record.
    """

    def __init__(self, run: ResolvedRun, renderer: ReferenceRenderer) -> None:
        self.generated: list[str] = []
        self.notes: list[str] = []
        self._renderer = renderer
        self._folder = references_folder(run.config)
        self._environment = generation_environment(run)

    def key(self, config: RunConfig) -> str:
        """Return the name under which the output of a configuration is kept."""
        return reference_key(config, self._environment)

    def output(self, config: RunConfig, role: str, requests: int = 1) -> GeneratedOutput:
        """Load the output of a configuration from its file; if there is none that can be read, generate and store it.

        Args:
            config: Configuration of the output.
            role: Part that the output plays, such as reference or floor.
            requests: Number of equal requests to generate, of which the last one counts.

        Returns:
            The latents and pixels.

        Raises:
            RequestFailed: The engine answered with a typed error.
            EngineGone: A rank died, or was not ready in time.
            ValueError: The output is not kept, and no other engine can be started here.
        """
        file = self._folder / f"{self.key(config)}.safetensors"
        with suppress(OSError, SafetensorError, KeyError):
            tensors = load_file(file)
            count = len(tensors) // 2
            return GeneratedOutput(
                [tensors[f"latents.{k}"] for k in range(count)], [tensors[f"pixels.{k}"] for k in range(count)]
            )
        output = self.generate(config, role, requests)
        arrays = {f"latents.{k}": np.ascontiguousarray(x) for k, x in enumerate(output.latents)}
        arrays |= {f"pixels.{k}": np.ascontiguousarray(x) for k, x in enumerate(output.pixels)}
        self._keep(file, save(arrays))
        return output

    def generate(self, config: RunConfig, role: str, requests: int = 1) -> GeneratedOutput:
        """Generate the output of a configuration without keeping it.

        Args:
            config: Configuration of the output.
            role: Part that the output plays, such as reference or floor.
            requests: Number of equal requests, of which the last one counts.

        Returns:
            The latents and pixels.

        Raises:
            RequestFailed: The engine answered with a typed error.
            EngineGone: A rank died, or was not ready in time.
            ValueError: No other engine can be started here.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise ValueError("under torchrun no other engine is started; run the same once with python -m harness")
        output = self._renderer.generate(config, role, requests)
        self.generated.append(role)
        return output

    def finding(self, subject: object, measure: Callable[[], Check | None]) -> Check | None:
        """Load a check from its file; if there is none, make it. One that passed is kept.

        Args:
            subject: What is checked, as plain data; code, machine and weights are added.
            measure: Function that makes the check; None says that there is nothing to compare with, which is kept too.

        Returns:
            The check.
        """
        file = self._folder / f"{_digest([subject, *self._environment])}.json"
        with suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode(file.read_bytes(), type=Check | None)
        found = measure()
        if found is None or found.passed:
            self._keep(file, msgspec.json.encode(found))
        return found

    def _keep(self, file: Path, content: bytes) -> None:
        try:
            self._folder.mkdir(0o700, parents=True, exist_ok=True)  # prompts and images are the user's alone
            write_atomically(file, content)
        except OSError as error:
            self.notes.append(f"fidelity: references are not kept for other runs: {failure_line(error)}")


def reference_config(config: RunConfig) -> RunConfig:
    """Return the configuration of a run's reference: one rank, float32, and no method that changes the output."""
    found = _plain_config(config)
    found.launch.reproducible = True
    set_float32(found)
    return found


def floor_config(config: RunConfig) -> RunConfig:
    """Return the configuration of the floor: the reference in the run's dtypes, with another order of additions."""
    found = _plain_config(config)
    found.launch.reproducible = False
    return found


def peer_config(config: RunConfig) -> RunConfig:
    """Return the configuration that holds the reference's own arithmetic: its first image, made by diffusers.

    Raises:
        ValueError: diffusers cannot run this model or request; one line says why.
    """
    found = reference_config(config)
    found.request.prompts, found.request.samples_per_prompt = (found.request.prompts or [])[:1], 1
    found.task.fidelity_per_step = False
    found.engine.name = DIFFUSERS
    found.model.offload = False
    if found.model.architecture not in BASELINES:
        raise ValueError(f"diffusers has no pipeline of model={found.model.name}")
    check_conflicts(found)
    check_engine(found)
    return found


def set_float32(config: RunConfig) -> None:
    """Make every component compute in float32."""
    config.model.dtype = DType.float32
    for name in ("denoiser", *COMPONENTS):
        part = getattr(config.model, name)
        part.dtype = None if part.dtype is None else DType.float32


def single_request(config: RunConfig) -> RunConfig:
    """Return a copy that makes the run's request once, in as many steps as its reference has, and measures nothing."""
    found = copy.deepcopy(config)
    found.task = TaskConfig(Task.generate, fidelity_per_step=config.task.fidelity_per_step)
    found.request.steps = config.task.reference_steps or config.request.steps
    return found


def _plain_config(config: RunConfig) -> RunConfig:
    """Return the run's request on one rank, without any method that changes the arithmetic."""
    found = single_request(config)
    found.engine, found.parallel = EngineConfig(optimize=Optimize.none), ParallelConfig()
    found.attention.backend, found.cache = "math", CacheConfig()
    found.model.quantize = Quantize.none
    found.request.batch_size = 1
    found.model.text.keep_loaded, found.model.text.cache_mib = True, None
    return found


def references_folder(config: RunConfig) -> Path:
    """Return the folder of the kept references: task.references, or one in the user's cache."""
    if config.task.references is not None:
        return Path(config.task.references).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "triptych" / "references"


def reference_key(config: RunConfig, environment: list[object]) -> str:
    """Return the name under which the output of a configuration is kept.

    Args:
        config: Configuration of the output.
        environment: Code, machine and weights, from `generation_environment`.

    Returns:
        24 hexadecimal digits, which name the file.
    """
    declared = to_dict(config)
    return _digest([{name: declared[name] for name in ("task", *BUILT_FROM, "request")}, *environment])


def without_prompts(config: RunConfig) -> dict[str, object]:
    """Return how a configuration makes its images as plain data, whatever their prompts and seeds."""
    declared = to_dict(config)
    request = {name: value for name, value in declared["request"].items() if name not in OF_PROMPTS}
    return {name: declared[name] for name in BUILT_FROM} | {"request": request}


def generation_environment(run: ResolvedRun) -> list[object]:
    """Return what an image depends on besides its request: the code, the machine, and the files of the weights."""
    packages = {name: version(name) for name in PACKAGES}
    machine: list[object] = [cpu_name(), platform.platform(), arithmetic_environment(), packages]
    if run.config.launch.mode is LaunchMode.inprocess:  # MKL has read this by the time a run could set it
        machine.append(os.environ.get("MKL_CBWR"))
    return [code_hash(), machine, weight_files(run)]


def code_hash() -> str:
    """Return a hash over every source file that affects an image."""
    root, digest = Path(__file__).parents[3], hashlib.sha256()
    for part in CODE:
        source = root / part
        for file in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def weight_files(run: ResolvedRun) -> list[tuple[str, int, int]]:
    """Return the name, size in bytes and modification time in ns of every file of a checkpoint."""
    layout, loras = run.checkpoint, run.config.model.lora
    roots = [layout.folder, *layout.replaced.values(), *(Path(lora.path).expanduser() for lora in loras)]
    files = [file for root in roots for file in (sorted(root.rglob("*")) if root.is_dir() else [root])]
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


def _digest(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
