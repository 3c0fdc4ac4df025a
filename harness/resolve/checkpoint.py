"""Which folder is a configuration's checkpoint, where its components are, and whether all of them are complete.

This is decided before a process starts, from names and headers only. The ranks decide it again and download nothing.
"""

from __future__ import annotations

import importlib.resources
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from harness.config.schema import ComponentConfig, DType, Load, ModelConfig
from models import hub
from models.component_rules import check_components
from models.configs.libraries import PROJECTED, check_weights_of_library, expected_of_library
from models.configs.table import expected_tensors
from models.detect import class_name, denoiser_class, is_component, matching_architectures, pipeline_name
from models.files import (
    INDEX,
    CheckpointError,
    check_component,
    check_names_and_shapes,
    check_tokenizer,
    component_files,
    find_config_folder,
    has_weights,
    list_tensors,
    read_header,
    read_json,
)
from models.lora_names import check_targets, match_layers
from models.registry import ARCHITECTURES, PUBLISHED, REFERENCE, SIZED, Architecture
from models.weight_layouts import check_layout_of_weights

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
    """The place of a checkpoint's files.

    Attributes:
        folder: The checkpoint's folder.
        replaced: The path that replaces a component, by the component's name.
        dtypes: The dtype in which a component is loaded, by the component's name.
    """

    folder: Path
    replaced: dict[str, Path] = field(default_factory=dict)
    dtypes: dict[str, DType] = field(default_factory=dict)

    def config_folder(self, component: str) -> Path:
        """Return the folder with the component's config.json."""
        return find_config_folder(self.replaced.get(component), self.folder / component)

    def weights(self, component: str) -> Path:
        """Return the folder of the component's weights, or the one file that holds them."""
        return self.replaced.get(component, self.folder / component)

    def files(self, component: str) -> list[Path]:
        """Return the files of a component's weights.

        Args:
            component: The component's name.

        Returns:
            One file, or every shard.

        Raises:
            CheckpointError: There are no files, or not all of them.
        """
        return component_files(self.weights(component))


def locate(model: ModelConfig, denoiser: str, fetch: bool = False) -> CheckpointLayout:
    """Find the files of a model's components.

    Args:
        model: The `model` group.
        denoiser: The network's folder in the checkpoint.
        fetch: Whether files of a hub name that are not in the local cache are downloaded.

    Returns:
        The checkpoint's layout on disk.

    Raises:
        CheckpointError: A folder, file or hub name does not exist, or the architecture has no such component.
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
        replaced[denoiser] = folder  # one network, published without folders (google/ddpm-cifar10-32)
    return CheckpointLayout(folder, replaced, dtypes)


def _refuse_strangers(model: ModelConfig, named: dict[str, ComponentConfig], row: Architecture) -> None:
    """Refuse a key of a component that the architecture does not have."""
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
    """Return the checkpoint's folder, or the one file of its denoiser."""
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
    """Return the patterns of the files of a hub checkpoint that this run reads."""
    row = ARCHITECTURES[model.architecture]
    networks = (denoiser, *row.weights)
    full = [] if model.load is Load.dummy else [name for name in networks if name not in replaced]
    found = hub.download_patterns(full, [*(name for name in networks if name not in full), *row.configs, "scheduler"])
    return found if row.weights else [*found, *hub.SINGLE_FOLDER_FILES]


def _existing(key: str, path: str) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        raise CheckpointError(f"{key}={path}: no such folder or file; give a checkpoint in the diffusers layout")
    return found


def _around(model: ModelConfig, file: Path) -> Path:
    """Return the checkpoint from which the other components of a denoiser's file are taken."""
    if file.suffix != ".safetensors" and not INDEX.fullmatch(file.name):
        raise CheckpointError(
            f"model.path={file}: not a safetensors file, and no other is read (pickles never are); convert it first"
        )
    own, linked = file.absolute().parent.parent, file.resolve().parent.parent  # the hub's cache holds links
    for folder in (own, linked, REFERENCE / model.name, PUBLISHED / model.name, SIZED / model.name):
        if (folder / "model_index.json").is_file():
            return folder
    raise CheckpointError(
        f"model.path={file} is one file, and no configuration of model={model.name} is shipped; give the folder of a "
        "checkpoint in the diffusers layout"
    )


def check_checkpoint(model: ModelConfig, layout: CheckpointLayout, denoiser: str) -> None:
    """Refuse a checkpoint that lacks a component, holds another kind of network, or is incomplete.

    Every engine reads the files into the same networks, and builds this project's own for their geometry.

    Args:
        model: The `model` group.
        layout: The checkpoint's layout on disk.
        denoiser: The network's folder in the checkpoint.

    Raises:
        CheckpointError: The message says what is missing, foreign or broken, and where.
    """
    row = ARCHITECTURES[model.architecture]
    _refuse_foreign(model, layout, denoiser)
    _refuse_lacking(model, layout, denoiser)
    for name in _present(row, layout, denoiser):
        _check_network(model, layout, name, denoiser)
    for name in row.configs:
        if layout.weights(name).is_dir():
            check_tokenizer(layout.weights(name))
        elif layout.weights(name).exists():
            raise CheckpointError(f"model.{name}.path={layout.weights(name)}: give the folder of a tokenizer")
    check_components(model.architecture, layout, denoiser)
    _check_loras(model, layout, denoiser)


def _check_network(model: ModelConfig, layout: CheckpointLayout, name: str, denoiser: str) -> None:
    """Refuse a network whose config.json is not supported, or whose weights do not fit it, from their headers alone."""
    row, folder, weights = ARCHITECTURES[model.architecture], layout.config_folder(name), layout.weights(name)
    classes = row.classes if name == denoiser else ()
    if name == "vae" and class_name(folder):
        classes = (row.vae,)
    stored = check_component(folder, None if model.load is Load.dummy else weights, classes)
    expected = expected_tensors(model.architecture, folder) if name == denoiser else None
    projected = name in PROJECTED.get(model.architecture, ())
    if model.load is Load.dummy:
        if expected is None:
            expected_of_library(folder, projected)
        return
    check_layout_of_weights(stored, str(read_json(folder / "config.json").get("_class_name")), weights)
    if expected is not None:
        found = {name: tensor.shape for name, tensor in stored.items()}
        check_names_and_shapes(expected, found, f"{weights} (sizes of {folder / 'config.json'})")
    else:
        check_weights_of_library(folder, stored, weights, projected)


def _present(row: Architecture, layout: CheckpointLayout, denoiser: str) -> list[str]:
    """Return the networks that are loaded: all but optional ones that the checkpoint does not have."""
    return [
        name
        for name in (denoiser, *row.weights)
        if name not in row.optional or name in layout.replaced or layout.config_folder(name).is_dir()
    ]


def _refuse_foreign(model: ModelConfig, layout: CheckpointLayout, denoiser: str) -> None:
    """Refuse a folder that is a single component, or a checkpoint of another architecture."""
    folder, row = layout.folder, ARCHITECTURES[model.architecture]
    if denoiser in layout.replaced:
        return  # only its class can be checked, together with the other components
    if is_component(folder):
        parent = folder.resolve().parent
        whole = f"model.path={parent}" if (parent / "model_index.json").is_file() else "the checkpoint's folder"
        raise CheckpointError(
            f"{folder}: one component ({class_name(folder) or 'with a config.json'}), not a checkpoint of "
            f"{' or '.join(row.classes)} and the rest; give {whole}, or replace one component: model.denoiser.path=DIR"
        )
    found = denoiser_class(folder, denoiser)
    fits = matching_architectures(folder, denoiser)
    if found is None or model.architecture in fits:
        return
    if found in row.classes and not fits:
        return  # the right denoiser; the missing components are reported later
    others = [f"model={name}" for fit in fits for name in models_of(fit)] or [f"model.architecture={f}" for f in fits]
    advice = f"use {' or '.join(others)}" if others else "no model here uses it"
    raise CheckpointError(
        f"{folder}: a checkpoint of {pipeline_name(folder) or 'another pipeline'} ({found}), which model={model.name} "
        f"({' or '.join(row.classes)}) does not load; {advice}"
    )


def models_of(architecture: str) -> list[str]:
    """Return the options of group `model` with an architecture."""
    files = sorted((Path(str(importlib.resources.files("conf"))) / "model").glob("*.yaml"))
    return [file.stem for file in files if yaml.safe_load(file.read_text()).get("architecture") == architecture]


def _refuse_lacking(model: ModelConfig, layout: CheckpointLayout, denoiser: str) -> None:
    """Refuse a checkpoint without one of its components, and name all that are missing."""
    row, dummy = ARCHITECTURES[model.architecture], model.load is Load.dummy
    absent = [name for name in (denoiser, *row.weights) if not layout.config_folder(name).is_dir()]
    absent += [name for name in row.configs if not (dummy or layout.config_folder(name).is_dir())]
    absent = [name for name in absent if name not in row.optional]
    if layout.folder.parent in (PUBLISHED, SIZED) and not dummy:  # configurations without weights
        absent += [n for n in row.weights if n not in layout.replaced and not has_weights(layout.folder / n)]
        lacking = [name for name in (*row.weights, *row.configs) if name in absent and name not in row.optional]
        if lacking:
            raise CheckpointError(
                f"model={model.name} has a denoiser's weights alone; {', '.join(lacking)} "
                f"{'lacks' if len(lacking) == 1 else 'lack'} files: give "
                f"{' '.join(f'model.{name}.path=PATH' for name in lacking)}, or model.path=DIR with all of them"
            )
    elif absent:
        expected = ", ".join((denoiser, *row.weights, *row.configs))
        raise CheckpointError(f"{layout.folder}: no {'/, no '.join(absent)}/ here; expected the folders {expected}")


def _check_loras(model: ModelConfig, layout: CheckpointLayout, denoiser: str) -> None:
    """Refuse updates that do not fit.

    Raises:
        CheckpointError: An update does not exist or does not fit.
    """
    if not model.lora:
        return
    if model.load is Load.dummy:
        warnings.warn("model.lora has no effect on random weights (model.load=dummy)", stacklevel=2)
        return
    parts = [name for name in _present(ARCHITECTURES[model.architecture], layout, denoiser) if name != "vae"]
    tensors = {part: list_tensors(layout.files(part)) for part in parts}
    for lora in model.lora:
        path = _existing("model.lora: path", lora.path)
        if path.is_dir():
            raise CheckpointError(f"model.lora: path={path}: a folder; give its safetensors file")
        stored, _ = read_header(path)
        own_class = class_name(layout.config_folder(denoiser)) or ""
        check_targets(match_layers(stored, tensors, denoiser, own_class, path), path)
