"""Updates merged at load: W + weight * (alpha / rank) * B A, in float32 and rounded once; or W + weight * difference.

Source: LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1); alpha and layer names as written by kohya's trainer, PEFT
and diffusers; whole differences of weights and biases as written by lightx2v and read by ComfyUI.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from models.checkpoint_source import CheckpointSource, LoraFile
from models.files import CheckpointError, StoredTensor, list_tensors, read_header, read_json
from models.lora_names import (
    LoraLayer,
    TensorUpdate,
    check_targets,
    match_layers,
    parse_layers,
    split_component,
)
from models.tensors import read_stored

METADATA_KEY = "lora_adapter_metadata"  # where diffusers stores PEFT's settings of an adapter
WEIGHT_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")  # PEFT initializations that change the base weights


class Update(Protocol):
    """What is added to one tensor."""

    def add_to(self, tensor: Tensor) -> None:
        """Add the update to a tensor in place, in float32."""


@dataclass(frozen=True)
class LowRank:
    """The update scale * B A of one tensor.

    Args:
        down: The function that reads A, (rank, in) or (rank, in, height, width).
        up: The function that reads B's rows of this tensor, (out, rank) or (out, rank, 1, 1).
        scale: The factor weight * alpha / rank.
    """

    down: Callable[[], Tensor]
    up: Callable[[], Tensor]
    scale: float

    def add_to(self, tensor: Tensor) -> None:
        """Add the update to a tensor in place, in float32."""
        tensor.view(len(tensor), -1).addmm_(self.up().flatten(1), self.down().flatten(1), alpha=self.scale)


@dataclass(frozen=True)
class WholeDifference:
    """The update scale * difference of one tensor, a weight or a bias.

    Args:
        read: The function that reads the difference's rows of this tensor.
        scale: The LoRA's weight.
    """

    read: Callable[[], Tensor]
    scale: float

    def add_to(self, tensor: Tensor) -> None:
        """Add the update to a tensor in place, in float32."""
        tensor.add_(self.read(), alpha=self.scale)


def merge_updates(stored: StoredTensor, updates: Sequence[Update]) -> Tensor:
    """Return a stored tensor with its updates added, float32 on the CPU."""
    tensor = read_stored(stored, torch.float32)
    for update in updates:
        update.add_to(tensor)
    return tensor


def lora_updates(source: CheckpointSource, component: str) -> dict[str, list[Update]]:
    """Return the updates of one component's tensors, by published name, in the order of the source's files.

    Raises:
        CheckpointError: A file of another kind, layers that match nothing, or shapes that do not fit.
    """
    found: dict[str, list[Update]] = {}
    if component != source.denoiser and not component.startswith("text_encoder"):
        return found
    for lora in source.loras:
        for name, updates in _file_updates(source, lora, component).items():
            found.setdefault(name, []).extend(updates)
    return found


def _file_updates(source: CheckpointSource, lora: LoraFile, component: str) -> dict[str, list[Update]]:
    """Return the updates of one component from one file, by published name."""
    file, path = _open_lora(lora.path), lora.path
    named = parse_layers(file.stored, path)
    parts = {source.denoiser, *(split_component(layer.name, source.denoiser)[0] for layer in named)}
    tensors = {part: list_tensors(source.weights(part)) for part in sorted(parts) if source.has(part)}
    config = source.config_folder(source.denoiser) / "config.json"
    class_name = str(read_json(config).get("_class_name")) if config.is_file() else ""
    targets = match_layers(file.stored, tensors, source.denoiser, class_name, path)
    check_targets(targets, path)
    return {
        name: file.updates(update, name.endswith(".bias"), lora.weight)
        for name, update in targets.found.get(component, {}).items()
    }


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
    """The tensors of one file, read on demand.

    Args:
        path: The file.
        stored: The tensors, by key.
        adapters: PEFT's settings of each component, by the prefix of its layers' names; the key "" applies to all.
    """

    path: Path
    stored: Mapping[str, StoredTensor]
    adapters: Mapping[str, AdapterConfig] = field(default_factory=dict)

    def updates(self, update: TensorUpdate, is_bias: bool, weight: float) -> list[Update]:
        """Return what one layer adds to one of its tensors."""
        layer, found = update.layer, list[Update]()
        if is_bias:
            return [WholeDifference(partial(self._read_rows, str(layer.diff_b), update), weight)]
        if layer.diff is not None:
            found.append(WholeDifference(partial(self._read_rows, layer.diff, update), weight))
        if layer.down is not None and layer.up is not None:
            up = partial(self._read_rows, layer.up, update)
            found.append(LowRank(partial(self._read, layer.down), up, weight * self._scale(layer, layer.down)))
        return found

    def _scale(self, layer: LoraLayer, down: str) -> float:
        """Return alpha / rank; 1 without an alpha."""
        rank = self.stored[down].shape[0]
        if layer.alpha is not None:
            return float(self._read(layer.alpha)) / rank
        prefix, _, name = layer.name.partition(".")
        adapter = self.adapters.get(prefix)
        return (adapter or self.adapters.get("", AdapterConfig())).scale(name if adapter else layer.name, rank)

    def _read(self, key: str) -> Tensor:
        return read_stored(self.stored[key], torch.float32)

    def _read_rows(self, key: str, update: TensorUpdate) -> Tensor:
        """Return the rows of a layer's tensor that belong to one tensor of the network."""
        start, end = update.rows
        rows = self._read(key)[start:end]
        return torch.cat(rows.chunk(2)[::-1]) if update.swapped else rows


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
    return LoraTensors(path, stored, adapters)
