"""Which features of a configuration do not go together, as data: the checks and the compatibility matrix read it.

Rules that need the numbers of a network or a request, such as its attention heads, are in harness.resolve.layout_rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from typing import Any

from harness.config.cache import NONE as NO_CACHE
from harness.config.cache import is_block_cache, is_guidance_cache
from harness.config.engines import CACHE_DIT, NATIVE, ON_DIFFUSERS, SGLANG
from harness.config.optimize import Optimize
from harness.config.schema import LaunchMode, Quantize, RunConfig
from harness.config.tasks import TRAITS
from harness.parallel.mesh import degrees, world_size
from harness.resolve.checkpoint_defaults import PUBLISHED_FAMILY
from harness.resolve.engines_table import BASELINES
from models.registry import ARCHITECTURES, returns_lse

OPTIMIZED = (Optimize.eager, Optimize.compile)
LEARNED = ("learned", "learned_range")
ON_SGLANG = tuple(name for name, row in BASELINES.items() if row.sglang is not None)


@dataclass(frozen=True)
class Feature:
    """Something that a configuration may use.

    Attributes:
        name: Name by which conflicts refer to it.
        label: What it is, for tables.
        key: Configuration key whose value messages show; empty to show the label.
        example: Overrides that use the feature.
        used: Test of whether a configuration uses the feature.
    """

    name: str
    label: str
    key: str
    example: tuple[str, ...]
    used: Callable[[RunConfig], bool]

    def setting(self, config: RunConfig) -> str:
        """Return what a configuration says about the feature, such as `parallel.tp=2`."""
        if not self.key:
            return self.label
        value: Any = reduce(getattr, self.key.replace("/", ".").split("."), config)
        value = getattr(value, "backend" if self.key == "attention" else "name", value)
        value = value.name if isinstance(value, Enum) else value
        return f"{self.key}={str(value).lower() if isinstance(value, bool) else value}"


def _feature(name: str, label: str, key: str, example: str, used: Callable[[RunConfig], bool]) -> Feature:
    return Feature(name, label, key, tuple(example.split()), used)


FEATURES = (
    _feature("tp", "tensor parallelism", "parallel.tp", "parallel.tp=2", lambda c: c.parallel.tp > 1),
    _feature("ring", "ring attention", "parallel.ring", "parallel.ring=2", lambda c: c.parallel.ring > 1),
    _feature(
        "exact_ring",
        "ring attention without displaced patches",
        "parallel.ring",
        "parallel.ring=2",
        lambda c: c.parallel.ring > 1 and not c.parallel.displaced,
    ),
    _feature("ulysses", "Ulysses", "parallel.ulysses", "parallel.ulysses=2", lambda c: c.parallel.ulysses > 1),
    _feature("pipe", "PipeFusion", "parallel.pipe", "parallel.pipe=2", lambda c: c.parallel.pipe > 1),
    _feature(
        "displaced",
        "displaced patches",
        "parallel.displaced",
        "parallel.ring=2 parallel.displaced=true",
        lambda c: c.parallel.displaced,
    ),
    _feature(
        "shard_weights",
        "sharded weights",
        "parallel.shard_weights",
        "parallel.cfg=2 parallel.shard_weights=true",
        lambda c: c.parallel.shard_weights,
    ),
    _feature("ranks", "several ranks", "", "parallel.dp=2", lambda c: world_size(degrees(c.parallel)) > 1),
    _feature(
        "without_lse",
        "an attention backend without log-sum-exp (sdpa)",
        "attention",
        "attention=sdpa",
        lambda c: c.attention.backend != "auto" and not returns_lse(c.attention.backend),
    ),
    _feature("unet", "U-Nets", "model", "model=sd15", lambda c: ARCHITECTURES[c.model.architecture].heads is None),
    _feature(
        "not_in_diffusers",
        "models that diffusers does not run here",
        "model",
        "model=ddpm_cifar10",
        lambda c: c.model.architecture not in BASELINES,
    ),
    _feature(
        "not_in_sglang",
        "models that SGLang-Diffusion does not run",
        "model",
        "model=wan_1_3b",
        lambda c: c.model.architecture not in ON_SGLANG,
    ),
    _feature("native", "engine=native", "engine", "engine=native", lambda c: c.engine.name == NATIVE),
    _feature("baseline", "baseline engines", "engine", "engine=diffusers", lambda c: c.engine.name != NATIVE),
    _feature(
        "on_diffusers",
        "engines on diffusers",
        "engine",
        "engine=diffusers",
        lambda c: c.engine.name in ON_DIFFUSERS,
    ),
    _feature("cache_dit", "engine=cache_dit", "engine", "engine=cache_dit", lambda c: c.engine.name == CACHE_DIT),
    _feature(
        "sglang", "engine=sglang", "engine", "engine=sglang model=z_image_110m", lambda c: c.engine.name == SGLANG
    ),
    _feature(
        "optimized",
        "engine.optimize=eager or compile",
        "engine.optimize",
        "engine.optimize=compile",
        lambda c: c.engine.optimize in OPTIMIZED,
    ),
    _feature(
        "eager",
        "engine.optimize=eager",
        "engine.optimize",
        "engine.optimize=eager",
        lambda c: c.engine.optimize is Optimize.eager,
    ),
    _feature(
        "compile",
        "engine.optimize=compile",
        "engine.optimize",
        "engine.optimize=compile",
        lambda c: c.engine.optimize is Optimize.compile,
    ),
    _feature(
        "compiled_graphs",
        "engine.compile.cuda_graphs=true",
        "engine.compile.cuda_graphs",
        "engine.optimize=compile engine.compile.cuda_graphs=true",
        lambda c: c.engine.compile.cuda_graphs,
    ),
    _feature("cache", "caches", "cache", "cache=guidance_skip", lambda c: c.cache.name != NO_CACHE),
    _feature("block_cache", "block caches", "cache", "cache=first_block", lambda c: is_block_cache(c.cache.name)),
    _feature(
        "guidance_cache",
        "guidance caches",
        "cache",
        "cache=guidance_interval",
        lambda c: is_guidance_cache(c.cache.name),
    ),
    _feature("teacache", "cache=teacache", "cache", "cache=teacache", lambda c: c.cache.name == "teacache"),
    _feature(
        "quantized",
        "8-bit linears",
        "model.quantize",
        "model.quantize=int8_dynamic",
        lambda c: c.model.quantize is not Quantize.none,
    ),
    _feature("offload", "offloaded networks", "model.offload", "model.offload=true", lambda c: c.model.offload),
    _feature(
        "unloaded_encoders",
        "unloaded text encoders",
        "model.text.keep_loaded",
        "model.text.keep_loaded=false",
        lambda c: not c.model.text.keep_loaded,
    ),
    _feature(
        "step_batching",
        "step batching",
        "serve.max_batch",
        "task=serve serve.max_batch=8",
        lambda c: TRAITS[c.task.name].serves and c.serve.max_batch > 1,
    ),
    _feature(
        "inprocess",
        "launch.mode=inprocess",
        "launch.mode",
        "launch.mode=inprocess",
        lambda c: c.launch.mode is LaunchMode.inprocess,
    ),
    _feature("train", "task=train", "task", "task=train", lambda c: not TRAITS[c.task.name].uses_checkpoint),
    _feature("plan", "task=plan", "task", "task=plan", lambda c: TRAITS[c.task.name].only_shapes),
    _feature(
        "serves",
        "task=serve or load",
        "task",
        "task=serve serve.max_batch=1",
        lambda c: TRAITS[c.task.name].serves,
    ),
    _feature(
        "fidelity_per_step",
        "task.fidelity_per_step=true",
        "task.fidelity_per_step",
        "task=bench task.fidelity=true task.fidelity_per_step=true",
        lambda c: c.task.fidelity_per_step,
    ),
    _feature(
        "rk45",
        "scheduler/solver=rk45",
        "scheduler/solver",
        "scheduler/solver=rk45",
        lambda c: c.scheduler.family != PUBLISHED_FAMILY and c.scheduler.solver.name == "rk45",
    ),
    _feature(
        "learned_variance",
        "a learned variance",
        "scheduler.solver.variance",
        "model=dit_256 scheduler=ddpm scheduler/solver=ddpm scheduler.solver.variance=learned_range",
        lambda c: c.scheduler.family != PUBLISHED_FAMILY and c.scheduler.solver.variance in LEARNED,
    ),
)
"""Every feature that a conflict names."""

BY_NAME = {feature.name: feature for feature in FEATURES}


@dataclass(frozen=True)
class Conflict:
    """A feature and those that it does not go with.

    Attributes:
        when: Name of the feature.
        with_what: Names of the features that it does not go with.
        because: Why, as a clause about the first feature. `{ranks}` stands for the number of ranks.
        instead: What to use, as an imperative; `{ranks}` likewise.
    """

    when: str
    with_what: tuple[str, ...]
    because: str
    instead: str

    def broken_by(self, config: RunConfig) -> list[str]:
        """Return the names of the features that a configuration uses in spite of this conflict."""
        if not BY_NAME[self.when].used(config):
            return []
        return [name for name in self.with_what if BY_NAME[name].used(config)]

    def message(self, config: RunConfig, other: str) -> str:
        """Return the one line that refuses a configuration for one of the features that it may not have."""
        ranks = str(world_size(degrees(config.parallel)))
        line = (
            f"{BY_NAME[self.when].setting(config)} does not go with {BY_NAME[other].setting(config)}: {self.because}; "
            f"{self.instead}"
        )
        return line.replace("{ranks}", ranks)


LAYOUT_CONFLICTS = (
    Conflict(
        "unet",
        ("tp", "pipe", "ring", "ulysses"),
        "it is a U-Net, whose convolutions mix tokens, so that neither heads nor tokens can be sharded",
        "use parallel.dp={ranks}, or parallel.cfg=2",
    ),
    Conflict(
        "unet",
        ("shard_weights",),
        "it is a U-Net, which has no equal blocks to shard",
        "use parallel.shard_weights=false",
    ),
    Conflict(
        "exact_ring",
        ("without_lse",),
        "it merges by log-sum-exp, which this backend does not return",
        "use attention=flash, flex or math",
    ),
    Conflict(
        "pipe",
        ("tp", "ring", "ulysses", "displaced", "shard_weights"),
        "it goes with parallel.dp and parallel.cfg alone",
        "leave out tp, ring, ulysses, displaced and shard_weights, or use parallel.pipe=1",
    ),
)
"""What does not go with a layout of ranks; a plan, which lists layouts, checks each with these."""

OFFLOAD_CONFLICTS = (
    Conflict(
        "offload",
        ("unloaded_encoders", "shard_weights", "baseline"),
        "it keeps every network of engine=native in CPU memory",
        "leave out model.text.keep_loaded=false, parallel.shard_weights=true and other engines",
    ),
)
OTHER_CONFLICTS = (
    Conflict("inprocess", ("ranks",), "it runs one rank, the layout has {ranks}", "use launch.mode=torchrun"),
    Conflict(
        "inprocess",
        ("serves",),
        "many requests at once go to ranks of their own",
        "use launch.mode=torchrun",
    ),
    Conflict("baseline", ("train",), "the native network is trained", "use engine=native"),
    Conflict("on_diffusers", ("not_in_diffusers",), f"it runs {', '.join(BASELINES)}", "use engine=native"),
    Conflict("sglang", ("not_in_sglang",), f"it runs {', '.join(ON_SGLANG)}", "use engine=native"),
    Conflict(
        "baseline", ("ranks",), "it runs one rank, the layout has {ranks}", "use parallel=single, or engine=native"
    ),
    Conflict(
        "baseline", ("fidelity_per_step",), "it does not provide the state after every step", "compare the last state"
    ),
    Conflict(
        "on_diffusers",
        ("rk45",),
        "rk45 chooses its timesteps by the image, and diffusers needs them in advance",
        "choose another solver, or engine=native",
    ),
    Conflict(
        "on_diffusers",
        ("learned_variance",),
        "diffusers' pipelines drop the learned variance",
        "choose small or large, or engine=native",
    ),
    Conflict(
        "cache_dit",
        ("unet",),
        "it skips blocks of transformers, and the model is a U-Net",
        "use engine=diffusers",
    ),
    Conflict("optimized", ("train",), "it has no effect on training", "use engine.optimize=none"),
    Conflict(
        "optimized",
        ("shard_weights",),
        "it uses a block's weights outside the block, where they are sharded",
        "use engine.optimize=none, or drop parallel.shard_weights",
    ),
    Conflict(
        "optimized",
        ("pipe",),
        "it computes for all blocks at once, and a pipeline shards them",
        "use engine.optimize=none, or drop parallel.pipe",
    ),
    Conflict(
        "optimized",
        ("cache_dit", "sglang"),
        "it optimises networks of engine=native or diffusers",
        "use engine=native, or engine.optimize=none",
    ),
    Conflict("eager", ("baseline",), "it changes the native network", "use engine=native, or engine.optimize=none"),
    Conflict(
        "compiled_graphs",
        ("native",),
        "the native network uses CUDA graphs with engine.eager.cuda_graphs=true, the default",
        "drop it, or use engine=diffusers",
    ),
    Conflict(
        "cache",
        ("baseline",),
        "it works only in the native engine",
        "leave out the engine, or use engine=cache_dit with cache=none",
    ),
    Conflict(
        "block_cache",
        ("unet",),
        "it skips equal blocks, and the model is a U-Net",
        "use cache=guidance_interval, guidance_skip or none",
    ),
    Conflict(
        "teacache",
        ("compile",),
        "it looks into a block, which is compiled into a graph",
        "use cache=first_block or engine.optimize=eager",
    ),
    Conflict(
        "cache",
        ("displaced", "pipe"),
        "it skips evaluations whose keys and values the layout reuses in the next one",
        "leave out parallel.displaced and parallel.pipe, or use cache=none",
    ),
    Conflict(
        "quantized",
        ("baseline", "train", "plan"),
        "it changes the native network that generates",
        "use engine=native, not task=train or plan",
    ),
    Conflict(
        "quantized",
        ("unet",),
        "it works on the linear layers of a transformer, and the model is a U-Net",
        "use model.quantize=none",
    ),
    Conflict(
        "quantized",
        ("optimized",),
        "it puts linear layers into a form that an optimised network does not fuse or pack",
        "use engine.optimize=none",
    ),
    Conflict(
        "quantized",
        ("tp", "shard_weights", "offload"),
        "it keeps the weights of a rank whole and on one device",
        "leave out parallel.tp, parallel.shard_weights=true and model.offload=true",
    ),
    Conflict(
        "step_batching",
        ("baseline", "offload", "displaced", "pipe"),
        "there one request runs after another",
        "set serve.max_batch=1",
    ),
)
CONFLICTS = (*LAYOUT_CONFLICTS, *OFFLOAD_CONFLICTS, *OTHER_CONFLICTS)
"""Every pair of features that is refused."""

OPTIMIZE_CONFLICTS = tuple(c for c in CONFLICTS if {"optimized", "eager"} & {c.when, *c.with_what})
"""What does not go with engine.optimize=eager; engine.optimize=auto is eager if none of it is used."""


def refusal(config: RunConfig, conflicts: Sequence[Conflict] = CONFLICTS) -> str | None:
    """Return why a configuration cannot run, or None if none of its features contradicts another."""
    for conflict in conflicts:
        if broken := conflict.broken_by(config):
            return conflict.message(config, broken[0])
    return None


def check_conflicts(config: RunConfig, conflicts: Sequence[Conflict] = CONFLICTS) -> None:
    """Refuse features that do not go together.

    Raises:
        ValueError: Two features do not go together; one line says why and what to use instead.
    """
    if (line := refusal(config, conflicts)) is not None:
        raise ValueError(line)
