"""task.fidelity: the reference of a request, drawn once and kept, and what a row's error against it means.

harness.metrics.fidelity says what the reference and the floor are.
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
from harness.parallel.mesh import Place, degrees
from harness.records.provenance import PACKAGES, cpu_name, version
from harness.records.record import write_atomically
from harness.resolve.checkpoint import COMPONENTS, locate
from harness.resolve.compose import ResolvedRun, to_dict
from harness.resolve.engines_table import CACHE_DIT, NATIVE
from harness.resolve.trained import trained_denoiser
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
    "harness/resolve/scheduler.py",
    "harness/serving/worker.py",
)


class Method(NamedTuple):
    """Something that a configuration may use where the reference does not, and what it claims to keep."""

    name: str
    method_class: str
    used: Callable[[RunConfig], bool]


METHODS = (
    Method("8-bit attention", APPROXIMATE, lambda c: c.attention.backend == "sage"),
    Method("8-bit linears", APPROXIMATE, lambda c: c.model.quantize is not Quantize.none),
    Method("attention kernel", EQUIVALENT, lambda c: c.attention.backend not in ("math", "sage")),
    Method("displaced patches", APPROXIMATE, lambda c: c.parallel.displaced),
    Method("PipeFusion", APPROXIMATE, lambda c: c.parallel.pipe > 1),
    Method("shared picture", EQUIVALENT, lambda c: Place(0, degrees(c.parallel)).replica_size > 1),
    Method("batching", EQUIVALENT, lambda c: c.request.batch_size > 1),
    Method("dtype", EQUIVALENT, lambda c: dtypes(c) != FLOAT32),
    Method("peer engine", EQUIVALENT, lambda c: c.engine.name != NATIVE),
    Method(
        "a peer's own rounding of the state", APPROXIMATE, lambda c: c.engine.name != NATIVE and dtypes(c) != FLOAT32
    ),
    Method("optimised network", EQUIVALENT, lambda c: c.engine.optimize is not Optimize.none),
    Method("cache-dit", APPROXIMATE, lambda c: c.engine.name == CACHE_DIT),
    Method("cache", APPROXIMATE, lambda c: c.cache.name != NONE),
    Method("fewer steps", APPROXIMATE, lambda c: c.task.reference_steps not in (None, c.request.steps)),
    Method("free order of additions", EQUIVALENT, lambda c: not c.launch.reproducible),
)


@dataclass(frozen=True)
class Drawn:
    """What one run drew, picture by picture: latents (1 or solver steps, *latent shape) and pixels."""

    latents: list[Array]
    pixels: list[Array]


@dataclass(frozen=True)
class Artist:
    """Draws references on engines of their own.

    Args:
        folder: of the run, in which each engine has a folder for its configuration and logs.
        bars: where the progress goes.
        make_engine: makes an engine, or finds one that is warm.
    """

    folder: Path
    bars: Progress
    make_engine: MakeEngine = new_engine

    def draw(self, config: RunConfig, what: str) -> Drawn:
        """What a configuration draws.

        Raises:
            RequestFailed, EngineGone: it could not be drawn.
        """
        task = self.bars.add_task(f"drawing the {what}", total=None)
        composed = ResolvedRun(config, [], self.folder / what, [])
        with DiffusionGenerator.from_composed(composed, composed.folder, self.make_engine) as generator:
            drawn = generator.generate(latents="steps" if config.task.states else "last")
        self.bars.remove_task(task)
        return Drawn(drawn.latents, drawn.pixels)


def method_class(config: RunConfig, methods: Sequence[Method] = METHODS) -> tuple[str, list[str]]:
    """The weakest claim among the methods that a configuration uses, and those methods."""
    used = [method for method in methods if method.used(config)]
    return min([EXACT, *(method.method_class for method in used)], key=STRENGTH.index), [m.name for m in used]


def measure(
    config: RunConfig,
    row: Drawn,
    artist: Artist,
    methods: Sequence[Method] = METHODS,
) -> tuple[Fidelity | None, list[str]]:
    """A row's error against its reference, and why there is none.

    Args:
        config: the row's.
        row: what it drew.
        artist: draws what was not drawn before.
        methods: what a configuration may use, with what each claims.
    """
    try:
        facts, home = origin(config), folder(config)
        plain, rounded = reference_config(config), floor_config(config)
        name = key(plain, facts)
        reference = kept(plain, home / f"{name}.safetensors", artist, "reference")
        floor = kept(rounded, home / f"{key(rounded, facts)}.safetensors", artist, "floor")
    except (RequestFailed, EngineGone, OSError, ValueError) as error:
        line = str(error).splitlines()[0]
        return None, [f"fidelity is not measured, as its reference failed: {line}; task.fidelity=false goes without"]
    claimed, names = method_class(config, methods)
    latent, pixel = difference(last(reference), last(row)), difference(reference.pixels, row.pixels, pixels=True)
    floor_latent = difference(last(reference), last(floor)).rel_l2
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
        steps_rel_l2=by_step(reference, row) if config.task.states else None,
    )
    return found, []


def last(drawn: Drawn) -> list[Array]:
    """The final latents."""
    return [latents[-1] for latents in drawn.latents]


def by_step(reference: Drawn, row: Drawn) -> list[float]:
    """Relative L2 of the state after every solver step, over all pictures."""
    steps = range(len(reference.latents[0]))
    return [difference([x[i] for x in reference.latents], [x[i] for x in row.latents]).rel_l2 for i in steps]


def reference_config(config: RunConfig) -> RunConfig:
    """The configuration of a row's reference: one rank, float32, nothing that a method changes."""
    found = _plain(config)
    found.launch.reproducible = True
    found.model.dtype = DType.float32
    for name in ("denoiser", *COMPONENTS):
        part = getattr(found.model, name)
        part.dtype = None if part.dtype is None else DType.float32
    return found


def floor_config(config: RunConfig) -> RunConfig:
    """The configuration of the floor: the reference in the row's dtypes, with another order of additions."""
    found = _plain(config)
    found.launch.reproducible = False
    return found


def _plain(config: RunConfig) -> RunConfig:
    """A row's request on one rank, without what is measured and without methods that change its arithmetic, in as many
    steps as its reference has.
    """
    found = copy.deepcopy(config)
    found.task = TaskConfig(Task.generate, states=config.task.states)
    found.engine, found.parallel = EngineConfig(optimize=Optimize.none), ParallelConfig()
    found.attention.backend, found.cache = "math", CacheConfig()
    found.model.quantize = Quantize.none
    found.request.batch_size = 1
    found.request.steps = config.task.reference_steps or config.request.steps
    found.model.text.keep, found.model.text.cache_mib = True, None
    return found


def kept(config: RunConfig, file: Path, artist: Artist, what: str) -> Drawn:
    """What a configuration draws: read from its file where it was drawn before, else drawn, and kept there.

    Raises:
        RequestFailed, EngineGone: it could not be drawn.
        ValueError: it cannot be drawn here.
    """
    if file.exists():
        tensors = load_file(file)
        count = len(tensors) // 2
        return Drawn([tensors[f"latents.{k}"] for k in range(count)], [tensors[f"pixels.{k}"] for k in range(count)])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("under a torchrun no other engine is started; run the same once with python -m harness")
    drawn = artist.draw(config, what)
    arrays = {f"latents.{k}": np.ascontiguousarray(x) for k, x in enumerate(drawn.latents)}
    arrays |= {f"pixels.{k}": np.ascontiguousarray(x) for k, x in enumerate(drawn.pixels)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, save(arrays))
    return drawn


def folder(config: RunConfig) -> Path:
    """Where references are kept."""
    if config.task.references is not None:
        return Path(config.task.references).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "triptych" / "references"


def key(config: RunConfig, facts: list[object]) -> str:
    """The name of what a configuration draws, from facts of its origin."""
    declared = to_dict(config)
    drawn = {name: declared[name] for name in ("task", "model", "scheduler", "request", "launch")}
    return hashlib.sha256(json.dumps([drawn, *facts], sort_keys=True).encode()).hexdigest()[:24]


def origin(config: RunConfig) -> list[object]:
    """What a drawn picture depends on beside what is asked: by which code, on what machine, from which weights."""
    machine = [cpu_name(), platform.platform(), {name: version(name) for name in PACKAGES}]
    return [code(), machine, weights(config)]


def code() -> str:
    """A hash of every source file that a picture passes through."""
    home, digest = Path(__file__).parents[2], hashlib.sha256()
    for part in CODE:
        root = home / part
        for file in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            digest.update(file.relative_to(home).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def weights(config: RunConfig) -> list[tuple[str, int, int]]:
    """The files of a checkpoint: their names, sizes and times of change."""
    place = locate(config.model, trained_denoiser(config).weights)
    roots = [place.folder, *place.replaced.values(), *(Path(lora.path).expanduser() for lora in config.model.lora)]
    files = [file for root in roots for file in (sorted(root.rglob("*")) if root.is_dir() else [root])]
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


def dtypes(config: RunConfig) -> set[DType]:
    """Those that any component is computed in."""
    model = config.model
    parts = [getattr(model, name).dtype for name in ("denoiser", *COMPONENTS)]
    return {model.dtype, *(part for part in parts if part is not None)}
