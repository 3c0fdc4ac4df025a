"""Low-rank updates merged at load: W + weight * (alpha / rank) * B A, in float32 and rounded once.

Source: LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1); alpha and the names of layers as kohya's trainer, PEFT
and diffusers write them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import msgspec
import torch
from torch import Tensor

from models.files import CheckpointError, Stored, read_header, read_json, tensors_of
from models.lora_names import (
    CONVERTERS,
    SHOWN,
    Layer,
    Targets,
    layers,
    misfits,
    owner,
    refuse_misfits,
    refuse_unknown,
    resolve,
)
from models.source import LoraFile, Source
from models.tensors import read_stored

ENERGY_TOLERANCE = 1e-5
METADATA_KEY = "lora_adapter_metadata"  # where diffusers writes what PEFT knows of an adapter
CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq")  # PEFT's ways to begin that change the weights themselves


@dataclass(frozen=True)
class LowRank:
    """The update scale * B A of one tensor.

    Args:
        down: reads A, (rank, in) or (rank, in, height, width).
        up: reads B, (out, rank) or (out, rank, 1, 1).
        scale: weight * alpha / rank.
    """

    down: Callable[[], Tensor]
    up: Callable[[], Tensor]
    scale: float

    def add_to(self, tensor: Tensor) -> None:
        """Adds the update in place, in float32."""
        tensor.view(len(tensor), -1).addmm_(self.up().flatten(1), self.down().flatten(1), alpha=self.scale)


def merged(stored: Stored, updates: Sequence[LowRank]) -> Tensor:
    """A stored tensor with its updates, float32 on the CPU."""
    tensor = read_stored(stored, torch.float32)
    for update in updates:
        update.add_to(tensor)
    return tensor


def updates_of(source: Source, component: str) -> dict[str, list[LowRank]]:
    """The updates of one component's tensors, by published name, in the order of the source's files.

    Raises:
        CheckpointError: a file of another kind, layers that match nothing, or shapes that do not fit.
    """
    found: dict[str, list[LowRank]] = {}
    if component != source.denoiser and not component.startswith("text_encoder"):
        return found
    for lora in source.loras:
        for name, update in _updates(source, lora).get(component, {}).items():
            found.setdefault(name, []).append(update)
    return found


def _updates(source: Source, lora: LoraFile) -> dict[str, dict[str, LowRank]]:
    """By component and published name, the updates of one file."""
    file = _open(lora.path)
    targets, tensors = _resolved(source, file)
    if targets.unknown and (loader := CONVERTERS.get(str(source.config(source.denoiser).get("_class_name")))):
        file = _converted(file, loader, source, targets.unknown)
        targets, tensors = _resolved(source, file)
    refuse_unknown(targets, lora.path)
    refuse_misfits(misfits(targets, tensors, file.shapes), lora.path)
    return {
        part: {name: file.update(layer, lora.weight) for name, layer in found.items()}
        for part, found in targets.found.items()
    }


def _resolved(source: Source, file: _LoraTensors) -> tuple[Targets, dict[str, dict[str, Stored]]]:
    named = layers(file.shapes, file.path)
    parts = {source.denoiser, *(owner(layer.name, source.denoiser)[0] for layer in named)}
    tensors = {part: tensors_of(source.weights(part)) for part in sorted(parts) if source.has(part)}
    return resolve(named, tensors, source.denoiser, file.path), tensors


class Adapter(msgspec.Struct, frozen=True):
    """What PEFT says of one component's update beside its matrices."""

    lora_alpha: float | None = None
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str | None = None

    def scale(self, layer: str, rank: int) -> float:
        """alpha / rank of a layer, or alpha / sqrt(rank) where it was trained so (rsLoRA, arXiv:2312.03732)."""
        own = (alpha for pattern, alpha in self.alpha_pattern.items() if re.match(rf"(.*\.)?({pattern})$", layer))
        alpha = next(own, self.lora_alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class _LoraTensors:
    """The matrices of one file, read when they are wanted.

    Args:
        path: the file.
        shapes: by key.
        read: a key's tensor in float32.
        adapters: by the prefix of its layers' names, what PEFT says of a component; under "", of all.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    def update(self, layer: Layer, weight: float = 1.0) -> LowRank:
        """One layer's update; without an alpha, the matrices alone are its scale."""
        rank = self.shapes[layer.down][0]
        if layer.alpha is not None:
            scale = float(self.read(layer.alpha)) / rank
        else:
            prefix, _, name = layer.name.partition(".")
            adapter = self.adapters.get(prefix)
            scale = (adapter or self.adapters.get("", Adapter())).scale(name if adapter else layer.name, rank)
        return LowRank(partial(self.read, layer.down), partial(self.read, layer.up), weight * scale)


def _open(path: Path) -> _LoraTensors:
    stored, metadata = read_header(path)
    beside = path.parent / "adapter_config.json"
    try:
        if METADATA_KEY in metadata:
            options: dict[str, object] = msgspec.json.decode(metadata[METADATA_KEY], type=dict[str, object])
            prefixes = sorted({key.partition(".")[0] for key in options})
            given = {
                p: {k.removeprefix(f"{p}."): v for k, v in options.items() if k.startswith(f"{p}.")} for p in prefixes
            }
        else:
            from_peft = beside.is_file() and any(name.startswith("base_model.") for name in stored)
            given = {"": read_json(beside)} if from_peft else {}
        adapters = {prefix: msgspec.convert(found, Adapter) for prefix, found in given.items()}
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{path}: what PEFT says of the adapter cannot be read ({error})") from error
    for adapter in adapters.values():
        if adapter.use_dora or str(adapter.init_lora_weights).startswith(CHANGES_WEIGHTS):
            kind = "DoRA" if adapter.use_dora else adapter.init_lora_weights
            raise CheckpointError(f"{path}: the adapter is {kind}; what is merged here is plain LoRA")
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    return _LoraTensors(path, shapes, lambda name: read_stored(stored[name], torch.float32), adapters)


def _converted(file: _LoraTensors, loader: str, source: Source, unknown: Sequence[Layer]) -> _LoraTensors:
    """The file with diffusers' names, by diffusers' own conversion, which must have lost nothing.

    Raises:
        CheckpointError: it cannot convert the file, or what it made of it is another update.
    """
    from diffusers import loaders

    plain = {key: file.read(key) for key in file.shapes}
    first = ", ".join(sorted(layer.name for layer in unknown)[:SHOWN])
    blocks = SimpleNamespace(layers_per_block=source.config(source.denoiser).get("layers_per_block"))
    try:
        found = getattr(loaders, loader).lora_state_dict(plain, unet_config=blocks, return_alphas=True)
    except Exception as error:  # of any kind, for the names are not what it expects
        raise CheckpointError(
            f"{file.path}: no layer matches {first}, and diffusers' {loader} cannot convert them either"
        ) from error
    tensors, alphas = found if isinstance(found, tuple) else (found, None)
    tensors = tensors | {name: torch.tensor(float(alpha)) for name, alpha in (alphas or {}).items()}
    made = _LoraTensors(file.path, {name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__)
    before, after = _energy(file), _energy(made)
    if not math.isclose(before, after, rel_tol=ENERGY_TOLERANCE):
        raise CheckpointError(
            f"{file.path}: diffusers' {loader} reads {after / before:.4f} of this LoRA's squared size, so it drops or "
            f"rescales a part of it (one of {first}?); convert the file to diffusers' names first"
        )
    return made


def _energy(file: _LoraTensors) -> float:
    """The sum of |scale * B A|^2 over all layers, which a change of names, a split or a fusion of layers keeps."""
    total = 0.0
    for layer in layers(file.shapes, file.path):
        update = file.update(layer)
        down, up = update.down().flatten(1).double(), update.up().flatten(1).double()
        total += update.scale**2 * float(((up.T @ up) * (down @ down.T)).sum())
    return total
