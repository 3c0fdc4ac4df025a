"""Which folder a configuration's checkpoint is, where each component of it lies, and whether all is there and whole.

Asked before a process starts, from names and headers alone; the ranks ask again, and fetch nothing.
"""

from __future__ import annotations

import importlib.resources
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from harness.config.schema import ComponentConfig, DType, Load, ModelConfig
from models import hub
from models.files import (
    CheckpointError,
    check_component,
    check_tokenizer,
    config_home,
    has_weights,
    read_header,
    tensors_of,
    weight_files,
)
from models.lora_names import CONVERTERS, layers, misfits, refuse_misfits, refuse_unknown, resolve
from models.recognise import architectures_of, class_name, denoiser_class, is_component, pipeline_name
from models.registry import ARCHITECTURES, PUBLISHED, REFERENCE, SIZED, Architecture

COMPONENTS = (
    "vae",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
)


@dataclass(frozen=True)
class CheckpointLayout:
    """Where a checkpoint lies: its folder, and by component what replaces it, and the dtype it is loaded in."""

    folder: Path
    replaced: dict[str, Path] = field(default_factory=dict)
    dtypes: dict[str, DType] = field(default_factory=dict)

    def config_folder(self, component: str) -> Path:
        """The folder with the component's config.json."""
        return config_home(self.replaced.get(component), self.folder / component)

    def weights(self, component: str) -> Path:
        """The folder of its weights, or the one file of them."""
        return self.replaced.get(component, self.folder / component)

    def files(self, component: str) -> list[Path]:
        """The files of its weights.

        Raises:
            CheckpointError: none there, or not all of them.
        """
        weights = self.weights(component)
        return [weights] if weights.is_file() else weight_files(weights)


def locate(model: ModelConfig, denoiser: str, fetch: bool = False) -> CheckpointLayout:
    """The place of a model's components.

    Args:
        model: the configuration.
        denoiser: the network's folder in the checkpoint.
        fetch: whether what a hub name lacks in the local cache is fetched.

    Raises:
        CheckpointError: no such folder, file or hub name, or a component that the architecture does not have.
    """
    row = ARCHITECTURES[model.architecture]
    named: dict[str, ComponentConfig] = {name: getattr(model, name) for name in COMPONENTS}
    _refuse_strangers(model, named, row)
    named[denoiser] = model.denoiser
    replaced = {
        name: _existing(f"model.{'denoiser' if name == denoiser else name}.path", part.path)
        for name, part in named.items()
        if part.path is not None
    }
    dtypes = {name: part.dtype for name, part in named.items() if part.dtype is not None}
    folder = _base(model, denoiser, replaced, fetch)
    if folder.is_file():
        replaced.setdefault(denoiser, folder)
        folder = _around(model, folder)
    elif not row.weights and denoiser not in replaced and not (folder / denoiser).is_dir() and class_name(folder):
        replaced[denoiser] = folder  # of one network, published without folders (google/ddpm-cifar10-32)
    return CheckpointLayout(folder, replaced, dtypes)


def _refuse_strangers(model: ModelConfig, named: dict[str, ComponentConfig], row: Architecture) -> None:
    """Refuses a key that says something of a component that the architecture does not have."""
    plain = ModelConfig()
    there = [*row.weights, *row.configs]
    for name, part in named.items():
        changed = [f.name for f in fields(part) if getattr(part, f.name) != getattr(getattr(plain, name), f.name)]
        if changed and name not in there:
            raise CheckpointError(
                f"model.{name}.{changed[0]}: architecture {model.architecture} has no {name}; it has "
                f"{', '.join(['denoiser', *there])}"
            )
        if name in row.configs and part.dtype is not None:
            raise CheckpointError(f"model.{name}.dtype has no effect: {name} has no weights; drop it")


def _base(model: ModelConfig, denoiser: str, replaced: dict[str, Path], fetch: bool) -> Path:
    """The checkpoint's folder, or its denoiser's one file."""
    path = model.hub if model.path == "hub" and model.hub is not None else model.path
    if path is not None and hub.is_hub_name(path):
        return hub.snapshot(path, model.revision, _wanted(model, denoiser, replaced), fetch)
    if model.revision is not None:
        raise CheckpointError(f"model.revision={model.revision} has no effect: model.path={path} is no hub name")
    if path is not None:
        return _existing("model.path", path)
    for shipped in (REFERENCE / model.name, PUBLISHED / model.name, SIZED / model.name):
        if shipped.is_dir() and (shipped.parent == REFERENCE or model.load is Load.dummy or model.denoiser.path):
            return shipped
    where = f", or its hub name: model.path={model.hub}" if model.hub else ""
    raise CheckpointError(
        f"model={model.name} is not shipped with its weights; give model.path=DIR, a folder in the diffusers layout"
        f"{where}; model.load=dummy runs random weights"
    )


def _wanted(model: ModelConfig, denoiser: str, replaced: dict[str, Path]) -> list[str]:
    """The files of a hub checkpoint that this run reads."""
    row = ARCHITECTURES[model.architecture]
    networks = (denoiser, *row.weights)
    full = [] if model.load is Load.dummy else [name for name in networks if name not in replaced]
    found = hub.wanted(full, [*(name for name in networks if name not in full), *row.configs, "scheduler"])
    return found if row.weights else [*found, *hub.WITHOUT_FOLDERS]


def _existing(key: str, path: str) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        raise CheckpointError(f"{key}={path}: no such folder or file; give a checkpoint in the diffusers layout")
    return found


def _around(model: ModelConfig, file: Path) -> Path:
    """The checkpoint that the other components of a denoiser's file are taken from."""
    if file.suffix != ".safetensors":
        raise CheckpointError(
            f"model.path={file}: not a safetensors file, and no other is read (pickles never are); convert it first"
        )
    own = file.resolve().parent.parent
    for folder in (own, REFERENCE / model.name, PUBLISHED / model.name, SIZED / model.name):
        if (folder / "model_index.json").is_file():
            return folder
    raise CheckpointError(
        f"model.path={file} is one file, and no configuration of model={model.name} is shipped; give the folder of a "
        "checkpoint in the diffusers layout"
    )


def check_checkpoint(model: ModelConfig, place: CheckpointLayout, denoiser: str) -> None:
    """Refuses a checkpoint that lacks a component, holds another kind of network, or is not whole.

    Raises:
        CheckpointError: what is missing, foreign or broken, and where.
    """
    row, dummy = ARCHITECTURES[model.architecture], model.load is Load.dummy
    _refuse_foreign(model, place, denoiser)
    _refuse_lacking(model, place, denoiser)
    for name in _present(row, place, denoiser):
        weights = None if dummy else place.weights(name)
        check_component(place.config_folder(name), weights, row.classes if name == denoiser else ())
    for name in row.configs:
        if place.weights(name).is_dir():
            check_tokenizer(place.weights(name))
        elif place.weights(name).exists():
            raise CheckpointError(f"model.{name}.path={place.weights(name)}: give the folder of a tokenizer")
    _check_loras(model, place, denoiser)


def _present(row: Architecture, place: CheckpointLayout, denoiser: str) -> list[str]:
    """The networks that are loaded: all but optional ones that are not there."""
    return [
        name
        for name in (denoiser, *row.weights)
        if name not in row.optional or name in place.replaced or place.config_folder(name).is_dir()
    ]


def _refuse_foreign(model: ModelConfig, place: CheckpointLayout, denoiser: str) -> None:
    """Refuses a folder that is one component, or a checkpoint of another architecture."""
    folder, row = place.folder, ARCHITECTURES[model.architecture]
    if denoiser in place.replaced:
        return  # its class is all there is to see, and is checked with the other components
    if is_component(folder):
        parent = folder.resolve().parent
        whole = f"model.path={parent}" if (parent / "model_index.json").is_file() else "the checkpoint's folder"
        raise CheckpointError(
            f"{folder}: one component ({class_name(folder) or 'with a config.json'}), not a checkpoint of "
            f"{' or '.join(row.classes)} and the rest; give {whole}, or replace one component: model.denoiser.path=DIR"
        )
    found = denoiser_class(folder, denoiser)
    fits = architectures_of(folder, denoiser)
    if found is None or model.architecture in fits:
        return
    if found in row.classes and not fits:
        return  # the right denoiser among components that are not all there, which is said of them
    others = [f"model={name}" for fit in fits for name in models_of(fit)] or [f"model.architecture={f}" for f in fits]
    advice = f"use {' or '.join(others)}" if others else "no model here draws from it"
    raise CheckpointError(
        f"{folder}: a checkpoint of {pipeline_name(folder) or 'another pipeline'} ({found}), which model={model.name} "
        f"({' or '.join(row.classes)}) does not load; {advice}"
    )


def models_of(architecture: str) -> list[str]:
    """The options of group `model` that have an architecture."""
    files = sorted((Path(str(importlib.resources.files("conf"))) / "model").glob("*.yaml"))
    return [file.stem for file in files if yaml.safe_load(file.read_text()).get("architecture") == architecture]


def _refuse_lacking(model: ModelConfig, place: CheckpointLayout, denoiser: str) -> None:
    """Refuses a checkpoint without one of its components, naming all that it lacks."""
    row, dummy = ARCHITECTURES[model.architecture], model.load is Load.dummy
    absent = [name for name in (denoiser, *row.weights) if not place.config_folder(name).is_dir()]
    absent += [name for name in row.configs if not (dummy or place.config_folder(name).is_dir())]
    absent = [name for name in absent if name not in row.optional]
    if place.folder.parent in (PUBLISHED, SIZED) and not dummy:  # configurations without weights
        absent += [n for n in row.weights if n not in place.replaced and not has_weights(place.folder / n)]
        lacking = [name for name in (*row.weights, *row.configs) if name in absent and name not in row.optional]
        if lacking:
            raise CheckpointError(
                f"model={model.name} has a denoiser's weights alone; {', '.join(lacking)} "
                f"{'lacks' if len(lacking) == 1 else 'lack'} files: give "
                f"{' '.join(f'model.{name}.path=PATH' for name in lacking)}, or model.path=DIR with all of them"
            )
    elif absent:
        expected = ", ".join((denoiser, *row.weights, *row.configs))
        raise CheckpointError(f"{place.folder}: no {'/, no '.join(absent)}/ here; expected the folders {expected}")


def _check_loras(model: ModelConfig, place: CheckpointLayout, denoiser: str) -> None:
    """Refuses low-rank updates that do not fit; those in a publisher's own names are converted, and so checked, at
    load.
    """
    if not model.lora:
        return
    if model.load is Load.dummy:
        warnings.warn("model.lora has no effect on random weights (model.load=dummy)", stacklevel=2)
        return
    parts = [name for name in _present(ARCHITECTURES[model.architecture], place, denoiser) if name != "vae"]
    tensors = {part: tensors_of(place.files(part)) for part in parts}
    for lora in model.lora:
        path = _existing("model.lora: path", lora.path)
        if path.is_dir():
            raise CheckpointError(f"model.lora: path={path}: a folder; give its safetensors file")
        stored, _ = read_header(path)
        targets = resolve(layers(stored, path), tensors, denoiser, path)
        if targets.unknown and class_name(place.config_folder(denoiser)) in CONVERTERS:
            continue
        refuse_unknown(targets, path)
        refuse_misfits(misfits(targets, tensors, {name: tensor.shape for name, tensor in stored.items()}), path)
