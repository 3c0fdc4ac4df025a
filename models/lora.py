"""Low-rank updates merged at load: W + weight * (alpha / rank) * B A, in float32 and rounded once.

Source: LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1); alpha and layer names as written by kohya's trainer, PEFT
and diffusers.
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

from models.checkpoint_source import CheckpointSource, LoraFile
from models.files import CheckpointError, StoredTensor, list_tensors, read_header, read_json
from models.lora_names import (
    CONVERTERS,
    MAX_LISTED,
    LoraLayer,
    LoraTargets,
    check_all_matched,
    check_update_shapes,
    match_layers,
    parse_layers,
    shape_mismatches,
    split_component,
)
from models.tensors import read_stored

ENERGY_TOLERANCE = 1e-5
METADATA_KEY = "lora_adapter_metadata"  # where diffusers stores PEFT's settings of an adapter
WEIGHT_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")  # PEFT initializations that change the base weights


@dataclass(frozen=True)
class LowRank:
    """The update scale * B A of one tensor.

    Args:
        down: The function that reads A, (rank, in) or (rank, in, height, width).
        up: The function that reads B, (out, rank) or (out, rank, 1, 1).
        scale: The factor weight * alpha / rank.
    """

    down: Callable[[], Tensor]
    up: Callable[[], Tensor]
    scale: float

    def add_to(self, tensor: Tensor) -> None:
        """Add the update to a tensor in place, in float32."""
        tensor.view(len(tensor), -1).addmm_(self.up().flatten(1), self.down().flatten(1), alpha=self.scale)


def merge_updates(stored: StoredTensor, updates: Sequence[LowRank]) -> Tensor:
    """Return a stored tensor with its updates added, float32 on the CPU."""
    tensor = read_stored(stored, torch.float32)
    for update in updates:
        update.add_to(tensor)
    return tensor


def lora_updates(source: CheckpointSource, component: str) -> dict[str, list[LowRank]]:
    """Return the updates of one component's tensors, by published name, in the order of the source's files.

    Raises:
        CheckpointError: A file of another kind, layers that match nothing, or shapes that do not fit.
    """
    found: dict[str, list[LowRank]] = {}
    if component != source.denoiser and not component.startswith("text_encoder"):
        return found
    for lora in source.loras:
        for name, update in _file_updates(source, lora).get(component, {}).items():
            found.setdefault(name, []).append(update)
    return found


def _file_updates(source: CheckpointSource, lora: LoraFile) -> dict[str, dict[str, LowRank]]:
    """Return the updates of one file, by component and published name."""
    file = _open_lora(lora.path)
    targets, tensors = _match_tensors(source, file)
    if targets.unknown and (loader := CONVERTERS.get(str(source.config(source.denoiser).get("_class_name")))):
        file = _convert_names(file, loader, source, targets.unknown)
        targets, tensors = _match_tensors(source, file)
    check_all_matched(targets, lora.path)
    check_update_shapes(shape_mismatches(targets, tensors, file.shapes), lora.path)
    return {
        part: {name: file.update(layer, lora.weight) for name, layer in found.items()}
        for part, found in targets.found.items()
    }


def _match_tensors(
    source: CheckpointSource, file: LoraTensors
) -> tuple[LoraTargets, dict[str, dict[str, StoredTensor]]]:
    named = parse_layers(file.shapes, file.path)
    parts = {source.denoiser, *(split_component(layer.name, source.denoiser)[0] for layer in named)}
    tensors = {part: list_tensors(source.weights(part)) for part in sorted(parts) if source.has(part)}
    return match_layers(named, tensors, source.denoiser, file.path), tensors


class AdapterConfig(msgspec.Struct, frozen=True):
    """PEFT's settings of one component's update, besides its matrices."""

    lora_alpha: float | None = None
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str | None = None

    def scale(self, layer: str, rank: int) -> float:
        """Return a layer's alpha / rank, or alpha / sqrt(rank) if it was trained so (rsLoRA, arXiv:2312.03732)."""
        own = (alpha for pattern, alpha in self.alpha_pattern.items() if re.match(rf"(.*\.)?({pattern})$", layer))
        alpha = next(own, self.lora_alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class LoraTensors:
    """The matrices of one file, read on demand.

    Args:
        path: The file.
        shapes: The shapes, by key.
        read: The function that reads a key's tensor in float32.
        adapters: PEFT's settings of each component, by the prefix of its layers' names; the key "" applies to all.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    adapters: Mapping[str, AdapterConfig] = field(default_factory=dict)

    def update(self, layer: LoraLayer, weight: float = 1.0) -> LowRank:
        """Return one layer's update; without an alpha, the scale is 1."""
        rank = self.shapes[layer.down][0]
        if layer.alpha is not None:
            scale = float(self.read(layer.alpha)) / rank
        else:
            prefix, _, name = layer.name.partition(".")
            adapter = self.adapters.get(prefix)
            scale = (adapter or self.adapters.get("", AdapterConfig())).scale(name if adapter else layer.name, rank)
        return LowRank(partial(self.read, layer.down), partial(self.read, layer.up), weight * scale)


def _open_lora(path: Path) -> LoraTensors:
    stored, metadata = read_header(path)
    peft_config = path.parent / "adapter_config.json"
    try:
        if METADATA_KEY in metadata:
            options: dict[str, object] = msgspec.json.decode(metadata[METADATA_KEY], type=dict[str, object])
            prefixes = sorted({key.partition(".")[0] for key in options})
            settings = {
                p: {k.removeprefix(f"{p}."): v for k, v in options.items() if k.startswith(f"{p}.")} for p in prefixes
            }
        else:
            from_peft = peft_config.is_file() and any(name.startswith("base_model.") for name in stored)
            settings = {"": read_json(peft_config)} if from_peft else {}
        adapters = {prefix: msgspec.convert(found, AdapterConfig) for prefix, found in settings.items()}
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{path}: the adapter's PEFT settings cannot be read ({error})") from error
    for adapter in adapters.values():
        if adapter.use_dora or str(adapter.init_lora_weights).startswith(WEIGHT_CHANGING_INITS):
            kind = "DoRA" if adapter.use_dora else adapter.init_lora_weights
            raise CheckpointError(f"{path}: the adapter is {kind}; only plain LoRA can be merged")
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    return LoraTensors(path, shapes, lambda name: read_stored(stored[name], torch.float32), adapters)


def _convert_names(
    file: LoraTensors, loader: str, source: CheckpointSource, unknown: Sequence[LoraLayer]
) -> LoraTensors:
    """Return the file with diffusers' names, by diffusers' own conversion, which must lose nothing.

    Raises:
        CheckpointError: The conversion fails, or its result is another update.
    """
    from diffusers import loaders

    plain = {key: file.read(key) for key in file.shapes}
    first = ", ".join(sorted(layer.name for layer in unknown)[:MAX_LISTED])
    blocks = SimpleNamespace(layers_per_block=source.config(source.denoiser).get("layers_per_block"))
    try:
        found = getattr(loaders, loader).lora_state_dict(plain, unet_config=blocks, return_alphas=True)
    except Exception as error:  # of any type: the names are not what it expects
        raise CheckpointError(
            f"{file.path}: no layer matches {first}, and diffusers' {loader} cannot convert them either"
        ) from error
    tensors, alphas = found if isinstance(found, tuple) else (found, None)
    tensors = tensors | {name: torch.tensor(float(alpha)) for name, alpha in (alphas or {}).items()}
    converted = LoraTensors(file.path, {name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__)
    before, after = _energy(file), _energy(converted)
    if not math.isclose(before, after, rel_tol=ENERGY_TOLERANCE):
        raise CheckpointError(
            f"{file.path}: diffusers' {loader} keeps {after / before:.4f} of this LoRA's squared norm, so it drops or "
            f"rescales a part of it (one of {first}?); convert the file to diffusers' names first"
        )
    return converted


def _energy(file: LoraTensors) -> float:
    """Return the sum of |scale * B A|^2 over all layers; renaming, splitting or fusing layers does not change it."""
    total = 0.0
    for layer in parse_layers(file.shapes, file.path):
        update = file.update(layer)
        down, up = update.down().flatten(1).double(), update.up().flatten(1).double()
        total += update.scale**2 * float(((up.T @ up) * (down @ down.T)).sum())
    return total
