"""From overrides to one checked configuration: names, types, then combinations, each refused in one line.

Everything here runs before a process starts and without importing torch.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.resources
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import msgspec
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config.cache import NONE as NO_CACHE
from harness.config.cache import check_cache
from harness.config.optimize import Optimize
from harness.config.plan import check_plan
from harness.config.schema import LaunchMode, Load, ModelConfig, ParallelConfig, RunConfig, Task, TrainedConfig
from harness.config.serve import check_load, check_serve
from harness.config.yaml import ConfigError as ConfigError
from harness.config.yaml import from_yaml as from_yaml
from harness.config.yaml import to_dict as to_dict
from harness.config.yaml import to_yaml as to_yaml
from harness.metrics import pretrained
from harness.parallel.mesh import AXES, degrees, world_size
from harness.records.media import ffmpeg
from harness.records.provenance import version
from harness.resolve.checkpoint import check_place, locate
from harness.resolve.comparison import check_sides, quoted
from harness.resolve.engine import check_engine
from harness.resolve.engines_table import NATIVE
from harness.resolve.layout import layout_facts
from harness.resolve.layout_rules import check_layout, keeps
from harness.resolve.limits import check_frames, check_request, check_served, check_size
from harness.resolve.optimize import resolve_optimize
from harness.resolve.published_scheduler import check_published
from harness.resolve.quantize import check_quantize
from harness.resolve.request import to_message
from harness.resolve.scheduler import noise_scheduler_settings
from harness.resolve.trained import PUBLISHED_FAMILY, fill_facts, trained_denoiser
from models.registry import ARCHITECTURES, nearest, resolve_backend
from schedulers.families import FAMILIES
from schedulers.families import resolve as resolve_settings

MAX_NAME_BYTES = 160
MAX_COLLECTIVE_S = 86_400
PLUGINS = {  # Hydra's own packages: what needs which, and the extra that installs it
    ("hydra/launcher", "slurm"): ("hydra-submitit-launcher", "slurm"),
    ("hydra/launcher", "submitit_slurm"): ("hydra-submitit-launcher", "slurm"),
    ("hydra/launcher", "submitit_local"): ("hydra-submitit-launcher", "slurm"),
    ("hydra/sweeper", "optuna"): ("hydra-optuna-sweeper", "optuna"),
}


@dataclass(frozen=True)
class Composed:
    """A checked configuration, what the user wrote to get it, and the folder that Hydra gives the run."""

    config: RunConfig
    overrides: list[str]
    folder: Path
    notes: list[str]


def register_schema() -> None:
    """Tells Hydra the types of every key, and how a sweep names a job's folder. Harmless when repeated."""
    if not OmegaConf.has_resolver("folder_name"):
        OmegaConf.register_new_resolver("folder_name", folder_name)
        ConfigStore.instance().store(name="schema", node=RunConfig)


def compose_run(overrides: Sequence[str]) -> Composed:
    """Composes, fills in the model's defaults and checks one run.

    Args:
        overrides: as on the command line, without Hydra's own flags.

    Raises:
        ConfigError: an unknown group, option or key, a wrong type, or a combination that cannot run.
    """
    overrides = [quoted(override) for override in overrides]
    check_names(overrides)
    register_schema()
    try:
        with _hydra():
            composed = compose("config", list(overrides), return_hydra_config=True)
            folder = Path(str(composed.hydra.run.dir))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    config, notes = checked(composed)
    return Composed(config, list(overrides), folder, notes)


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra on conf/ while it lasts; also inside a job of its own sweep, whose state is put back."""
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_module("conf", version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


def folder_name(overrides: str) -> str:
    """A job's overrides as one folder's name: no slashes, and never longer than a file system allows."""
    name = overrides.replace("/", ".")
    if len(name.encode()) <= MAX_NAME_BYTES:
        return name
    return f"{name.encode()[:MAX_NAME_BYTES].decode(errors='ignore')}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def run_folder(overrides: Sequence[str]) -> Path:
    """The folder that a run with these overrides has, also where the rest of them cannot be composed."""
    return Path(str(_own_settings(overrides).run.dir))


def sweep_folder(overrides: Sequence[str]) -> Path:
    """The folder that a sweep with these overrides has."""
    return Path(str(_own_settings(overrides).sweep.dir))


def _own_settings(overrides: Sequence[str]) -> DictConfig:
    """Hydra's node, with what these overrides say of folders."""
    register_schema()
    own = [override for override in overrides if override.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
    with _hydra():
        settings: DictConfig = compose("config", own, return_hydra_config=True).hydra
        return settings


def checked(composed: DictConfig) -> tuple[RunConfig, list[str]]:
    """The dataclasses of what Hydra composed, with the model's defaults filled in and combinations checked; and
    warnings.

    Raises:
        ConfigError: a wrong type or a combination that cannot run.
    """
    if OmegaConf.get_type(composed) is not RunConfig:
        raise ConfigError("the configuration is not a RunConfig; keep `- schema` first in conf/config.yaml's defaults")
    try:
        config = RunConfig(**{f.name: _plain(composed, f.name) for f in fields(RunConfig)})
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from error
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _resolve(config)
        except (ValueError, OSError) as error:
            raise ConfigError(one_line(error)) from error
    return config, [str(w.message) for w in caught if w.category is UserWarning]


def _plain(composed: DictConfig, name: str) -> Any:
    """One part of what Hydra composed and typed, as its dataclass."""
    value = composed[name]
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


def one_line(error: BaseException) -> str:
    """An exception's message on one line, without Hydra's advice to set variables."""
    text = str(error)
    if text.startswith("Could not override 'scheduler/solver'"):
        return (
            "scheduler/solver has no effect beside the checkpoint's own noise scheduler (scheduler=published, this "
            "model's default); add scheduler=rectified_flow, ddpm or sgm"
        )
    if text.startswith("Error merging override") and error.__cause__ is not None:
        text = f"{text.removeprefix('Error merging override ')}: {error.__cause__}"
    lines = [line.strip() for line in text.splitlines()]
    kept = [
        line for line in lines if line and not line.startswith(("Set the environment", "object_type", "reference_type"))
    ]
    return "; ".join(kept) or type(error).__name__


# ---------------------------------------------------------------- names


def check_names(overrides: Sequence[str], sweep: bool = False) -> None:
    """Refuses overrides whose group, option or key does not exist, naming the nearest that does.

    Args:
        overrides: as on the command line.
        sweep: whether a value may be a list of choices, one job each.

    Raises:
        ConfigError: what is unknown, and what was probably meant.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(
            f"{one_line(error)}; put values with = , {{ }} or quotes in single quotes inside the argument"
        ) from error
    for override in parsed:
        _check_name(override)
        if override.is_sweep_override() and not sweep:
            key, _, value = (override.input_line or override.key_or_group).partition("=")
            raise ConfigError(
                f"{key}={value} names several values; to mean one, quote it inside the argument: '{key}=\"{value}\"'; "
                "to run each, add -m"
            )


def _check_name(override: Override) -> None:
    key = override.key_or_group
    if key in ("hydra/launcher", "hydra/sweeper"):
        _check_plugin(key, str(override.value()))
    if key.split(".")[0] == "hydra" or key.startswith("hydra/"):
        return
    groups = _groups()
    if key in groups:
        for option in _options(override):
            if option is not None and option not in groups[key]:
                raise ConfigError(
                    f"{key}={option}: no such option{_hint(option, groups[key])} (there are {', '.join(groups[key])})"
                )
        return
    keys = set(_keys(RunConfig(model=ModelConfig(trained={family: TrainedConfig() for family in FAMILIES}))))
    if key not in keys:
        known = keys | set(groups)
        raise ConfigError(f"unknown key {key!r}{_hint(key, known)}")


def _check_plugin(group: str, name: str) -> None:
    package, extra = PLUGINS.get((group, name), (None, None))
    if package is not None and version(package) is None:
        raise ConfigError(f"{group}={name} needs the package {package}: pip install 'triptych[{extra}]'")


def _options(override: Override) -> list[str | None]:
    value = override.value()
    if override.is_choice_sweep():
        return [str(v) for v in override.sweep_string_iterator()]
    if override.is_sweep_override():
        return []  # a glob or a range, which Hydra resolves itself
    return [None if value is None else str(value)]


def _groups() -> dict[str, list[str]]:
    """Every group of conf/, nested ones by path, with the options it has."""
    root = Path(str(importlib.resources.files("conf")))
    groups: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.yaml")):
        group = file.parent.relative_to(root).as_posix()
        if group != ".":
            groups.setdefault(group, []).append(file.stem)
    return groups


def _keys(node: Any, prefix: str = "") -> Iterable[str]:
    for name, value in (node if isinstance(node, dict) else vars(node)).items():
        yield prefix + name
        if is_dataclass(value) or isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")


def _hint(name: str, known: Iterable[str]) -> str:
    names = sorted(known, key=lambda n: (not n.startswith("request."), n.startswith("model.trained."), n))
    if "." in name and (near := nearest(name, names)):
        return near
    leaves = [other.rsplit(".", 1)[-1] for other in names]
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, n=1)
    return f"; did you mean {names[leaves.index(close[0])]}?" if close else ""


# ---------------------------------------------------------------- combinations


def _resolve(config: RunConfig) -> None:
    """Fills what is null from the model, and refuses what cannot run."""
    check_sides(config)
    _check_report(config)
    if config.task.name is Task.report:
        return  # draws nothing, so nothing of what is drawn has to fit
    if config.task.name is Task.plan:
        config.model.load = Load.dummy  # shapes are all that is asked of a network
        check_plan(config.plan, config.hardware, config.runs)
        if config.parallel != ParallelConfig():
            warnings.warn("parallel has no effect with task=plan, which lists every layout", stacklevel=2)
    _resolve_request(config)
    _check_layout(config, _check_model(config))
    if config.scheduler.family != PUBLISHED_FAMILY:
        resolve_settings(noise_scheduler_settings(config.scheduler), config.request.steps)
    resolve_backend(config.attention.backend)
    check_engine(config)
    resolve_optimize(config)
    _check_cache(config)
    check_quantize(config)
    if config.task.name in (Task.serve, Task.load):
        whole = config.model.offload or keeps(config.parallel)
        check_serve(config.serve, config.engine.name == NATIVE and not whole)
        check_load(config.load)
    if config.task.name is Task.load:
        _check_drawn(config)
    pretrained.check(config.quality)
    if config.task.warmup < 0 or config.task.repeats < 1:
        raise ValueError("task.warmup must be at least 0 and task.repeats at least 1")
    if config.task.bound is not None and not config.task.fidelity:
        raise ValueError(f"task.bound={config.task.bound} bounds a measured error; add task.fidelity=true")
    _check_reference(config)
    if config.launch.reuse < 0:
        raise ValueError(f"launch.reuse={config.launch.reuse}; give at least 0, which starts fresh ranks for every job")


def _check_report(config: RunConfig) -> None:
    if config.task.name is Task.report:
        if config.runs is None:
            raise ValueError("task=report needs a folder of runs; add runs=DIR, such as runs=sweeps")
    elif config.task.out is not None:
        raise ValueError("task.out has an effect with task=report only; add it, or drop it")
    elif config.runs is not None and config.task.name is not Task.plan:
        raise ValueError("runs has an effect with task=report and task=plan only; add one, or drop it")


def _resolve_request(config: RunConfig) -> None:
    request, model = config.request, config.model
    if request.prompt is not None and request.prompts is not None:
        raise ValueError("give request.prompt or request.prompts, not both")
    if request.prompt is not None:
        request.prompts, request.prompt = [request.prompt], None
    if request.prompts is None:
        request.prompts = list(model.examples)
    own = model.trained.get(config.scheduler.family, TrainedConfig())
    steps = model.steps if own.steps is None else own.steps
    guidance = model.guidance if own.guidance is None else own.guidance
    request.steps = steps if request.steps is None else request.steps
    request.guidance = guidance if request.guidance is None else request.guidance
    for name in ("height", "width", "frames", "negative_prompt"):
        if getattr(request, name) is None:
            setattr(request, name, getattr(model, name))
    message = to_message(request)
    check_request(message)
    check_size(message.height, message.width, model.size_multiple, model.max_pixels)
    check_frames(message.frames, model.frame_multiple, model.max_frames)
    if message.frames > 1:
        ffmpeg()


def _check_drawn(config: RunConfig) -> None:
    """Refuses a load of which a request cannot be drawn, or that nobody takes."""
    message = to_message(config.request)
    for steps in config.load.steps or [message.steps]:
        asked = msgspec.structs.replace(message, prompts=message.prompts[:1], steps=steps)
        check_request(asked)
        check_served(asked, config.serve)
    for side in config.load.sizes:
        check_size(side, side, config.model.size_multiple, config.model.max_pixels)
    if config.launch.mode is LaunchMode.inprocess:
        raise ValueError("task=load sends many requests at once to ranks of their own; use launch.mode=torchrun")


def _check_model(config: RunConfig) -> Path | None:
    """Refuses a checkpoint that cannot run; the folder of its denoiser's config.json, None where none is read."""
    model = config.model
    if model.architecture not in ARCHITECTURES:
        raise ValueError(
            f"model.architecture={model.architecture} is unknown{nearest(model.architecture, ARCHITECTURES)}"
        )
    if config.task.name is Task.train:
        return None
    denoiser = trained_denoiser(config).weights
    fill_facts(config)
    place = locate(model, denoiser, fetch=True)
    check_place(model, place, denoiser)
    if config.scheduler.family == PUBLISHED_FAMILY:
        check_published(config.scheduler, place.folder)
    for name in ("size_multiple", "max_pixels", "frame_multiple", "max_frames", "fps"):
        if getattr(model, name) < 1:
            raise ValueError(f"model.{name}={getattr(model, name)}; give at least 1")
    if model.text.cache_mib is not None and model.text.cache_mib < 0:
        raise ValueError(f"model.text.cache_mib={model.text.cache_mib}; give at least 0, which keeps none")
    if model.offload and not (model.text.keep and config.engine.name == NATIVE and not config.parallel.shard_weights):
        raise ValueError(
            "model.offload=true keeps every network in CPU memory; leave out model.text.keep=false, "
            "parallel.shard_weights=true and engine=diffusers"
        )
    if model.text.tokens < 1:
        raise ValueError(f"model.text.tokens={model.text.tokens}; give at least 1")
    return place.config_folder(denoiser)


def _check_cache(config: RunConfig) -> None:
    has_blocks = ARCHITECTURES[config.model.architecture].heads is not None
    check_cache(config.cache, config.model.name, has_blocks, to_message(config.request).guidance)
    if config.cache.name == NO_CACHE:
        return
    if config.engine.name != NATIVE:
        raise ValueError(
            f"cache={config.cache.name} is of the native engine; leave out engine={config.engine.name}, or use "
            "engine=cache_dit with cache=none"
        )
    if config.cache.name == "teacache" and config.engine.optimize is Optimize.compile:
        raise ValueError(
            "cache=teacache looks into a block, which engine.optimize=compile makes a graph of; use cache=first_block "
            "or engine.optimize=eager"
        )
    if keeps(config.parallel):
        raise ValueError(
            f"cache={config.cache.name} leaves out what this layout keeps from each evaluation for the next, keys and "
            "values; leave out parallel.displaced and parallel.pipe, or use cache=none"
        )
    if config.task.name in (Task.plan, Task.train):
        warnings.warn(f"cache has no effect with task={config.task.name.name}", stacklevel=2)


def _check_reference(config: RunConfig) -> None:
    steps = config.task.reference_steps
    if steps is None:
        return
    if not config.task.fidelity:
        raise ValueError(f"task.reference_steps={steps} is of a measured error; add task.fidelity=true")
    if config.task.states and steps != config.request.steps:
        raise ValueError("task.states compares step by step, and task.reference_steps is another number; drop one")
    check_request(msgspec.structs.replace(to_message(config.request), steps=steps))


def _check_layout(config: RunConfig, denoiser: Path | None) -> None:
    for axis in (*AXES, "pipe"):
        if (size := getattr(config.parallel, axis)) < 1:
            raise ValueError(f"parallel.{axis}={size}; a degree is at least 1")
    ranks = world_size(degrees(config.parallel))
    if config.launch.mode is LaunchMode.inprocess and ranks > 1:
        raise ValueError(f"launch.mode=inprocess runs one rank, the layout has {ranks}; use launch.mode=torchrun")
    if denoiser is not None:
        for note in check_layout(config.parallel, layout_facts(config, denoiser)):
            warnings.warn(note, stacklevel=2)
    threads = config.launch.threads_per_rank
    if threads is not None and threads < 1:
        raise ValueError(f"launch.threads_per_rank={threads}; give at least 1, or null for cores / ranks")
    waiting = config.launch.collective_timeout_s
    if not 1 <= waiting <= MAX_COLLECTIVE_S:
        raise ValueError(f"launch.collective_timeout_s={waiting:g}; give 1 to {MAX_COLLECTIVE_S} seconds")
