"""The tensors of a checkpoint that a LoRA file updates: from names and shapes alone, without torch.

A layer's update is two matrices, down (A) and up (B), and sometimes a number alpha. Trainers use several names for
them. The layer's own name is the published one with dots (diffusers, PEFT) or with underscores (kohya).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.files import CheckpointError, StoredTensor

MAX_LISTED = 6
ROLES = {
    "down": re.compile(r"(\.lora_A(\.\w+)?|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight$"),
    "up": re.compile(r"(\.lora_B(\.\w+)?|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight$"),
    "alpha": re.compile(r"(([._]lora|\.lora_linear_layer)\.down\.weight)?\.alpha$"),
}
OTHER_KINDS = {
    r"\.(dora_scale|lora_magnitude_vector)\b": "DoRA",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.b?oft_": "OFT",
    r"\.lora_mid\.": "LoCon with a middle matrix",
    r"\.lora_embedding_": "LoRA of an embedding",
    r"\.lora_(B|up)(\.\w+)?\.bias$": "LoRA with a bias",
    r"\.diff(_b)?$": "a full difference",
}
CONVERTERS = {  # from a denoiser's class to the diffusers loader that converts its publisher's names
    "UNet2DConditionModel": "StableDiffusionXLLoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
    "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
    "WanTransformer3DModel": "WanLoraLoaderMixin",
}
DENOISER = ("base_model.model.", "diffusion_model.", "transformer.", "unet.", "lora_unet_", "lora_transformer_")
TEXT_ENCODERS = {
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
ENCODER_PARTS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
CLIP_PREFIX = "text_model."  # of CLIP's published names; newer files omit it


@dataclass(frozen=True)
class LoraLayer:
    """One layer's update: the names of its matrices in the file.

    Args:
        name: The layer's own name in the file.
        down: The name of A, (rank, in) or (rank, in, height, width).
        up: The name of B, (out, rank) or (out, rank, 1, 1).
        alpha: The name of the number that scales the update, divided by the rank; None if it is not in the file.
    """

    name: str
    down: str
    up: str
    alpha: str | None = None


def parse_layers(keys: Iterable[str], path: Path) -> list[LoraLayer]:
    """Return the layers of a LoRA file.

    Raises:
        CheckpointError: Another kind of file, or a layer with only one of the two matrices.
    """
    roles: dict[str, dict[str, str]] = {}
    for key in keys:
        name, role = _role(key, path)
        if role in roles.setdefault(name, {}):
            raise CheckpointError(f"{path}: {name} has two updates, {roles[name][role]} and {key}")
        roles[name][role] = key
    if not roles:
        raise CheckpointError(f"{path}: not a LoRA file; it holds no tensor")
    if incomplete := sorted(name for name, found in roles.items() if not {"down", "up"} <= found.keys()):
        raise CheckpointError(f"{path}: not a complete LoRA; one of the two matrices of {_list(incomplete)} is missing")
    return [LoraLayer(name, found["down"], found["up"], found.get("alpha")) for name, found in roles.items()]


def _role(key: str, path: Path) -> tuple[str, str]:
    for role, pattern in ROLES.items():
        if found := pattern.search(key):
            return _without_processor(key[: found.start()], found.group(0).startswith("_lora")), role
    kind = next((kind for pattern, kind in OTHER_KINDS.items() if re.search(pattern, key)), "not a matrix of a LoRA")
    raise CheckpointError(f"{path}: {key} is {kind}; only LoRA can be merged, two matrices per layer and alpha")


def _without_processor(name: str, processor: bool) -> str:
    """Return a layer's name without the parts that diffusers' attention processors once added."""
    name = name.replace(".processor.", ".")
    parent, _, last = name.rpartition(".")
    if not processor:
        return name
    if name.startswith("text_encoder"):
        return f"{parent}.{ENCODER_PARTS.get(last, last)}"
    return f"{name}.0" if last == "to_out" else name


def split_component(name: str, denoiser: str) -> tuple[str, str]:
    """Return the component that a layer belongs to, and the layer's name in it."""
    for prefix, component in TEXT_ENCODERS.items():
        if name.startswith(prefix):
            return component, name.removeprefix(prefix)
    for prefix in DENOISER:
        if name.startswith(prefix):
            return denoiser, name.removeprefix(prefix)
    return denoiser, name


@dataclass(frozen=True)
class LoraTargets:
    """The tensors that a file's layers update.

    Args:
        found: The layer of each published tensor name, by component.
        unknown: The layers without a tensor.
    """

    found: dict[str, dict[str, LoraLayer]]
    unknown: list[LoraLayer]


def match_layers(
    found: Sequence[LoraLayer], tensors: Mapping[str, Iterable[str]], denoiser: str, path: Path
) -> LoraTargets:
    """Return the tensors that layers update.

    Args:
        found: The layers of a file.
        tensors: The published tensor names of each component.
        denoiser: The component of names without a prefix.
        path: The file.

    Raises:
        CheckpointError: Two layers for one tensor.
    """
    tables = {component: _table(names) for component, names in tensors.items()}
    targets: dict[str, dict[str, LoraLayer]] = {component: {} for component in tensors}
    unknown: list[LoraLayer] = []
    for layer in found:
        component, name = split_component(layer.name, denoiser)
        table = tables.get(component, {})
        tensor = next((table[spelling] for spelling in _spellings(name) if spelling in table), None)
        if tensor is None:
            unknown.append(layer)
        elif tensor in targets[component]:
            names = f"{targets[component][tensor].name} and {layer.name}"
            raise CheckpointError(f"{path}: {tensor} has two updates, {names}")
        else:
            targets[component][tensor] = layer
    return LoraTargets(targets, unknown)


def _spellings(name: str) -> list[str]:
    """Return a layer's name, with and without the prefix of CLIP's published names."""
    prefixes = [CLIP_PREFIX, CLIP_PREFIX.replace(".", "_")]
    return [name, *(prefix + name for prefix in prefixes), *(name.removeprefix(prefix) for prefix in prefixes)]


def _table(names: Iterable[str]) -> dict[str, str]:
    """Return a component's tensors by layer name, with dots and with underscores."""
    table = {}
    for name in names:
        if name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            table[layer.replace(".", "_")] = table[layer] = name
    return table


def check_all_matched(targets: LoraTargets, path: Path) -> None:
    """Raise an error if a layer matches no tensor.

    Raises:
        CheckpointError: The names of those layers, in one line.
    """
    if targets.unknown:
        names = _list(sorted(layer.name for layer in targets.unknown))
        parts = ", ".join(targets.found)
        raise CheckpointError(f"{path}: no layer of {parts} matches {names}; was the LoRA trained on this model?")


def check_update_shapes(wrong: Sequence[str], path: Path) -> None:
    """Raise an error if a layer's matrices do not have the shapes that their tensor needs.

    Raises:
        CheckpointError: All of them, in one line.
    """
    if wrong:
        raise CheckpointError(f"{path}: the LoRA does not fit the network: {_list(sorted(wrong), '; ')}")


def shape_mismatches(
    targets: LoraTargets, tensors: Mapping[str, Mapping[str, StoredTensor]], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Return the shape errors of updates, one line each.

    Args:
        targets: The tensor that each layer updates.
        tensors: The stored tensors, by component and published name.
        shapes: The shapes of the LoRA file's tensors, by key.
    """
    wrong = [
        _shape_mismatch(name, tensors[part][name].shape, shapes[layer.down], shapes[layer.up])
        for part, found in targets.found.items()
        for name, layer in found.items()
    ]
    return [line for line in wrong if line is not None]


def _shape_mismatch(tensor: str, shape: tuple[int, ...], down: tuple[int, ...], up: tuple[int, ...]) -> str | None:
    """Return the shape error of one update, or None: B A must have the tensor's shape, 1 x 1 kernels being matrices."""
    flat_shape, flat_down, flat_up = _drop_unit_dims(shape), _drop_unit_dims(down), _drop_unit_dims(up)
    if len(flat_up) == 2 and flat_down[0] == flat_up[1] and (flat_up[0], *flat_down[1:]) == flat_shape:
        return None
    return f"{tensor} is {shape}, its update {up} times {down}"


def _drop_unit_dims(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _list(names: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return between.join(names[:MAX_LISTED]) + more
