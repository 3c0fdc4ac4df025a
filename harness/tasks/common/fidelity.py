"""task.fidelity: the cached reference of a request, and the meaning of a run's error against it.

harness.metrics.fidelity defines the reference and the floor.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import Progress
from safetensors.numpy import load_file, save

from harness.client.generator import DiffusionGenerator
from harness.config.cache import NONE, CacheConfig
from harness.config.optimize import Optimize
from harness.config.schema import DType, EngineConfig, ParallelConfig, Quantize, RunConfig, Task, TaskConfig
from harness.engines.pool import MakeEngine, new_engine
from harness.engines.protocol import RequestFailed
from harness.messages import Array
from harness.metrics.difference import difference
from harness.metrics.fidelity import APPROXIMATE, EQUIVALENT, EXACT, Fidelity, verdict
from harness.parallel.mesh import degrees, world_size
from harness.records.provenance import PACKAGES, cpu_name, version
from harness.records.record import write_atomically
from harness.resolve.checkpoint import COMPONENTS
from harness.resolve.compose import ResolvedRun, to_dict
from harness.resolve.engines_table import CACHE_DIT, NATIVE
from harness.serving.transport import EngineGone

STRENGTH = (APPROXIMATE, EQUIVALENT, EXACT)
FLOAT32 = {DType.float32}
CODE = (
    "models",
    "schedulers",
    "harness/build",
    "harness/device/device.py",
    "harness/optimize",
    "harness/pipeline",
    "harness/resolve/checkpoint.py",
    "harness/resolve/layout.py",
    "harness/resolve/published_scheduler.py",
    "harness/resolve/run.py",
    "harness/resolve/scheduler.py",
    "harness/serving/worker.py",
)


class Method(NamedTuple):
    """A feature that a configuration may use and the reference does not.

    Attributes:
        name: Name of the feature in the record.
        method_class: Class that the feature claims: exact, fp_equivalent or approximate.
        used: Test of whether a configuration uses the feature.
    """

    name: str
    method_class: str
    used: Callable[[RunConfig], bool]


METHODS = (
    Method("8-bit attention", APPROXIMATE, lambda c: c.attention.backend == "sage"),
    Method("8-bit linears", APPROXIMATE, lambda c: c.model.quantize is not Quantize.none),
    Method("attention kernel", EQUIVALENT, lambda c: c.attention.backend not in ("math", "sage")),
    Method("displaced patches", APPROXIMATE, lambda c: c.parallel.displaced),
    Method("PipeFusion", APPROXIMATE, lambda c: c.parallel.pipe > 1),
    Method("one image over several ranks", EQUIVALENT, lambda c: world_size(degrees(c.parallel)[1:]) > 1),
    Method("batching", EQUIVALENT, lambda c: c.request.batch_size > 1),
    Method("dtype", EQUIVALENT, lambda c: compute_dtypes(c) != FLOAT32),
    Method("baseline engine", EQUIVALENT, lambda c: c.engine.name != NATIVE),
    Method(
        "baseline engine's own rounding of the state",
        APPROXIMATE,
        lambda c: c.engine.name != NATIVE and compute_dtypes(c) != FLOAT32,
    ),
    Method("optimised network", EQUIVALENT, lambda c: c.engine.optimize is not Optimize.none),
    Method("cache-dit", APPROXIMATE, lambda c: c.engine.name == CACHE_DIT),
    Method("cache", APPROXIMATE, lambda c: c.cache.name != NONE),
    Method("fewer steps", APPROXIMATE, lambda c: c.task.reference_steps not in (None, c.request.steps)),
    Method("order of additions not fixed", EQUIVALENT, lambda c: not c.launch.reproducible),
)


@dataclass(frozen=True)
class GeneratedOutput:
    """The output of one run, one entry per image.

    Attributes:
        latents: Latents of each image, (1 or solver steps, *latent shape).
        pixels: Pixels of each image.
    """

    latents: list[Array]
    pixels: list[Array]


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

    def generate(self, config: RunConfig, role: str) -> GeneratedOutput:
        """Generate the output of a configuration.

        Args:
            config: Configuration of the reference or of the floor.
            role: "reference" or "floor", the name of the engine's folder.

        Returns:
            The latents and pixels.

        Raises:
            RequestFailed: The engine answered with a typed error.
            EngineGone: A rank died, or was not ready in time.
        """
        task = self.bars.add_task(f"generating the {role}", total=None)
        run = ResolvedRun(config, [], self.folder / role, [])
        with DiffusionGenerator.from_resolved(run, run.folder, self.make_engine) as generator:
            generation = generator.generate(latents="steps" if config.task.fidelity_per_step else "last")
        self.bars.remove_task(task)
        return GeneratedOutput(generation.latents, generation.pixels)


def method_class(config: RunConfig, methods: Sequence[Method] = METHODS) -> tuple[str, list[str]]:
    """Return the weakest class among the methods that a configuration uses, and the names of those methods.

    Args:
        config: Configuration of the run.
        methods: All known methods.

    Returns:
        The class, and the names of the methods in use.
    """
    used = [method for method in methods if method.used(config)]
    return min([EXACT, *(method.method_class for method in used)], key=STRENGTH.index), [m.name for m in used]


def measure_fidelity(
    run: ResolvedRun,
    output: GeneratedOutput,
    renderer: ReferenceRenderer,
    methods: Sequence[Method] = METHODS,
) -> tuple[Fidelity | None, list[str]]:
    """Measure a run's error against its reference.

    Args:
        run: The resolved run.
        output: Latents and pixels that the run generated.
        renderer: Generator of references that are not cached yet.
        methods: All known methods, with the class that each claims.

    Returns:
        The fidelity, or None if it could not be measured; and notes that say why not.
    """
    config = run.config
    try:
        environment, home = generation_environment(run), references_folder(config)
        exact, rounded = reference_config(config), floor_config(config)
        name, floor_name = reference_key(exact, environment), reference_key(rounded, environment)
        reference = load_or_generate(exact, home / f"{name}.safetensors", renderer, "reference")
        floor = load_or_generate(rounded, home / f"{floor_name}.safetensors", renderer, "floor")
    except (RequestFailed, EngineGone, OSError, ValueError) as error:
        line = str(error).splitlines()[0]
        return None, [f"fidelity is not measured because its reference failed: {line}; task.fidelity=false skips it"]
    claimed, names = method_class(config, methods)
    exact_latents = final_latents(reference)
    latent = difference(exact_latents, final_latents(output))
    pixel = difference(reference.pixels, output.pixels, pixels=True)
    floor_latent = difference(exact_latents, final_latents(floor)).rel_l2
    floor_pixel = difference(reference.pixels, floor.pixels).rel_l2
    found = Fidelity(
        method_class=claimed,
        methods=names,
        latent=latent,
        pixel=pixel,
        floor_latent=floor_latent,
        floor_pixel=floor_pixel,
        verdict=verdict(claimed, latent, pixel, floor_latent, floor_pixel),
        reference=name,
        steps_rel_l2=rel_l2_by_step(reference, output) if config.task.fidelity_per_step else None,
    )
    return found, []


def final_latents(output: GeneratedOutput) -> list[Array]:
    """Return the latents after the last solver step, one per image."""
    return [latents[-1] for latents in output.latents]


def rel_l2_by_step(reference: GeneratedOutput, output: GeneratedOutput) -> list[float]:
    """Return the relative L2 error of the state after every solver step, over all images."""
    steps = range(len(reference.latents[0]))
    return [difference([x[i] for x in reference.latents], [x[i] for x in output.latents]).rel_l2 for i in steps]


def reference_config(config: RunConfig) -> RunConfig:
    """Return the configuration of a run's reference: one rank, float32, and no method that changes the output."""
    found = _single_rank_config(config)
    found.launch.reproducible = True
    found.model.dtype = DType.float32
    for name in ("denoiser", *COMPONENTS):
        part = getattr(found.model, name)
        part.dtype = None if part.dtype is None else DType.float32
    return found


def floor_config(config: RunConfig) -> RunConfig:
    """Return the configuration of the floor: the reference in the run's dtypes, with another order of additions."""
    found = _single_rank_config(config)
    found.launch.reproducible = False
    return found


def _single_rank_config(config: RunConfig) -> RunConfig:
    """Return the run's request on one rank, in as many steps as its reference has.

    Measurements are removed, and so are all methods that change the arithmetic.
    """
    found = copy.deepcopy(config)
    found.task = TaskConfig(Task.generate, fidelity_per_step=config.task.fidelity_per_step)
    found.engine, found.parallel = EngineConfig(optimize=Optimize.none), ParallelConfig()
    found.attention.backend, found.cache = "math", CacheConfig()
    found.model.quantize = Quantize.none
    found.request.batch_size = 1
    found.request.steps = config.task.reference_steps or config.request.steps
    found.model.text.keep_loaded, found.model.text.cache_mib = True, None
    return found


def load_or_generate(config: RunConfig, file: Path, renderer: ReferenceRenderer, role: str) -> GeneratedOutput:
    """Load the output of a configuration from its file; if there is none, generate and store it.

    Args:
        config: Configuration of the reference or of the floor.
        file: File of the cached output, (name, tensor) pairs as safetensors.
        renderer: Generator of the output.
        role: "reference" or "floor".

    Returns:
        The latents and pixels.

    Raises:
        RequestFailed: The engine answered with a typed error.
        EngineGone: A rank died, or was not ready in time.
        ValueError: The output is not cached, and no other engine can be started here.
    """
    if file.exists():
        tensors = load_file(file)
        count = len(tensors) // 2
        return GeneratedOutput(
            [tensors[f"latents.{k}"] for k in range(count)], [tensors[f"pixels.{k}"] for k in range(count)]
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("under torchrun no other engine is started; run the same once with python -m harness")
    output = renderer.generate(config, role)
    arrays = {f"latents.{k}": np.ascontiguousarray(x) for k, x in enumerate(output.latents)}
    arrays |= {f"pixels.{k}": np.ascontiguousarray(x) for k, x in enumerate(output.pixels)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, save(arrays))
    return output


def references_folder(config: RunConfig) -> Path:
    """Return the folder of the cached references: task.references, or one in the user's cache."""
    if config.task.references is not None:
        return Path(config.task.references).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "triptych" / "references"


def reference_key(config: RunConfig, environment: list[object]) -> str:
    """Return the cache key of a configuration's output.

    Args:
        config: Configuration of the reference or of the floor.
        environment: Code, machine and weights, from `generation_environment`.

    Returns:
        24 hexadecimal digits, which name the file.
    """
    declared = to_dict(config)
    relevant = {name: declared[name] for name in ("task", "model", "scheduler", "request", "launch")}
    return hashlib.sha256(json.dumps([relevant, *environment], sort_keys=True).encode()).hexdigest()[:24]


def generation_environment(run: ResolvedRun) -> list[object]:
    """Return what an image depends on besides its request: the code, the machine, and the files of the weights."""
    machine = [cpu_name(), platform.platform(), {name: version(name) for name in PACKAGES}]
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


def compute_dtypes(config: RunConfig) -> set[DType]:
    """Return the dtypes that the components compute in."""
    model = config.model
    parts = [getattr(model, name).dtype for name in ("denoiser", *COMPONENTS)]
    return {model.dtype, *(part for part in parts if part is not None)}
