"""Which folder a configuration's checkpoint is, where each component of it lies, and whether all is there and whole.

Asked before a process starts, from names and headers alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from harness.config.schema import ComponentConfig, DType, Load, ModelConfig
from models.files import CheckpointError, check_component
from models.registry import ARCHITECTURES, PUBLISHED, REFERENCE

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
class Place:
    """Where a checkpoint lies: its folder, and by component what replaces it, and the dtype it is loaded in."""

    folder: Path
    replaced: dict[str, Path] = field(default_factory=dict)
    dtypes: dict[str, DType] = field(default_factory=dict)

    def config_folder(self, component: str) -> Path:
        """The folder with the component's config.json."""
        other = self.replaced.get(component)
        return other if other is not None and other.is_dir() else self.folder / component

    def weights(self, component: str) -> Path:
        """The folder of its weights, or the one file of them."""
        return self.replaced.get(component, self.folder / component)


def locate(model: ModelConfig, denoiser: str) -> Place:
    """The place of a model's components.

    Args:
        model: the configuration.
        denoiser: the network's folder in the checkpoint.

    Raises:
        CheckpointError: no such folder or file, or a path that must be given.
    """
    named: dict[str, ComponentConfig] = {name: getattr(model, name) for name in COMPONENTS}
    named[denoiser] = model.denoiser
    replaced = {
        name: _existing(f"model.{'denoiser' if name == denoiser else name}.path", part.path)
        for name, part in named.items()
        if part.path is not None
    }
    dtypes = {name: part.dtype for name, part in named.items() if part.dtype is not None}
    folder = _base(model)
    if folder.is_file():
        replaced[denoiser] = folder
        folder = PUBLISHED / model.name
    elif denoiser not in replaced and not (folder / denoiser).is_dir() and (folder / "config.json").is_file():
        replaced[denoiser] = folder  # of one network, published without folders (google/ddpm-cifar10-32)
    return Place(folder, replaced, dtypes)


def _base(model: ModelConfig) -> Path:
    if model.path is not None:
        return _existing("model.path", model.path)
    for shipped in (REFERENCE / model.name, PUBLISHED / model.name):
        if shipped.is_dir() and (shipped.parent == REFERENCE or model.load is Load.dummy or model.denoiser.path):
            return shipped
    where = f", or its hub name: model.path={model.hub}" if model.hub else ""
    raise CheckpointError(
        f"model={model.name} is not shipped with its weights; give model.path=DIR, a folder in the diffusers layout"
        f"{where}; model.load=dummy runs random weights"
    )


def _existing(key: str, path: str) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        raise CheckpointError(f"{key}={path}: no such folder or file; give a checkpoint in the diffusers layout")
    return found


def check_place(model: ModelConfig, place: Place, denoiser: str) -> None:
    """Refuses a checkpoint that lacks a component, holds another kind of network, or is not whole.

    Raises:
        CheckpointError: what is missing, foreign or broken, and where.
    """
    row = ARCHITECTURES[model.architecture]
    dummy = model.load is Load.dummy
    for name in (denoiser, *row.weights):
        if name in row.optional and name not in place.replaced and not place.config_folder(name).is_dir():
            continue
        if not place.config_folder(name).is_dir():
            expected = ", ".join((denoiser, *row.weights, *row.configs))
            raise CheckpointError(f"{place.folder}: no {name}/ here; expected the folders {expected}")
        weights = None if dummy else place.weights(name)
        check_component(place.config_folder(name), weights, row.classes if name == denoiser else ())
    for name in row.configs:
        folder = place.config_folder(name)
        if not (dummy or name in row.optional or folder.is_dir()):
            raise CheckpointError(f"{place.folder}: no {name}/ here; copy the checkpoint's tokenizer files")
