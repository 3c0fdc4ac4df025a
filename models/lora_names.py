"""The tensors of a checkpoint that a LoRA file updates: from names and shapes alone, without torch.

A layer's update is two matrices, down (A) and up (B), and sometimes a number alpha; or whole differences of its weight
(diff) and of its bias (diff_b). Trainers use several names for them. The layer's own name is that of diffusers or of
the publisher, with dots (diffusers, PEFT) or with underscores (kohya).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from models.files import FLOATS, CheckpointError, StoredTensor
from models.publisher_names import PublishedRows, publisher_layers

MAX_LISTED = 6
ROLES = {
    "down": re.compile(
        r"(\.lora_A(\.\w+)?|\.lora_down|[._]lora\.down|(?<=_lora[12])\.down|\.lora_linear_layer\.down)\.weight$"
    ),
    "up": re.compile(r"(\.lora_B(\.\w+)?|\.lora_up|[._]lora\.up|(?<=_lora[12])\.up|\.lora_linear_layer\.up)\.weight$"),
    "alpha": re.compile(r"(([._]lora|\.lora_linear_layer)\.down\.weight)?\.alpha$"),
    "diff": re.compile(r"\.diff$"),
    "diff_b": re.compile(r"\.diff_b$"),
}
MODULATION = ".diff_m"  # lightx2v's name for the whole difference of a block's modulation, which is in no layer
OTHER_KINDS = {
    r"\.(dora_scale|lora_magnitude_vector)\b": "DoRA",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.b?oft_": "OFT",
    r"\.lora_mid\.": "LoCon with a middle matrix",
    r"\.lora_embedding_": "LoRA of an embedding",
    r"\.lora_(B|up)(\.\w+)?\.bias$": "LoRA with a bias",
}
COMPILED = "_orig_mod."  # of torch.compile, at any depth
DENOISER = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "lora_unet_", "lora_transformer_")
WRAPPERS = ("base_model.model.", "module.", "default.")  # of PEFT, of data parallel training, of adapters by name
TEXT_ENCODERS = {
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
PREFIXES: Mapping[str, str | None] = {**dict.fromkeys((*DENOISER, *WRAPPERS)), **TEXT_ENCODERS}
ENCODER_PARTS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
CLIP_PREFIX = "text_model."  # of CLIP's published names; newer files omit it
FAMILIES = {  # a part of a layer's name that only one family of networks has, by the network's class
    "FluxTransformer2DModel": ("FLUX", r"double_blocks|single_blocks|single_transformer_blocks"),
    "SD3Transformer2DModel": ("Stable Diffusion 3", r"joint_blocks"),
    "UNet2DConditionModel": ("Stable Diffusion 1, 2 or XL", r"(input|output|down|up)_blocks|mid(dle)?_block"),
    "WanTransformer3DModel": ("Wan", r"blocks[._]\d+[._](self_attn|cross_attn|ffn[._](net|[02]))"),
    "ZImageTransformer2DModel": ("Z-Image", r"noise_refiner|context_refiner|layers[._]\d+[._]attention[._]"),
    "QwenImageTransformer2DModel": ("Qwen-Image", r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)"),
}


@dataclass(frozen=True)
class LoraLayer:
    """One layer's update: the names of its tensors in the file.

    Args:
        name: The layer's own name in the file.
        down: The name of A, (rank, in) or (rank, in, height, width); None if there are no matrices.
        up: The name of B, (out, rank) or (out, rank, 1, 1).
        alpha: The name of the number that scales the update, divided by the rank; None if it is not in the file.
        diff: The name of the whole difference of the weight; None if there is none.
        diff_b: The name of the whole difference of the bias; None if there is none.
    """

    name: str
    down: str | None = None
    up: str | None = None
    alpha: str | None = None
    diff: str | None = None
    diff_b: str | None = None


def parse_layers(stored: Mapping[str, StoredTensor], path: Path) -> list[LoraLayer]:
    """Return the layers of a LoRA file.

    Args:
        stored: The tensors of the file, by key.
        path: The file.

    Raises:
        CheckpointError: Another kind of file, a tensor of another kind, or a layer with one of its two matrices.
    """
    roles: dict[str, dict[str, str]] = {}
    for key, tensor in stored.items():
        name, role = _role(key, path)
        _check_stored(tensor, role, path)
        if role in roles.setdefault(name, {}):
            raise CheckpointError(f"{path}: {name} has two updates, {roles[name][role]} and {key}")
        roles[name][role] = key
    if not roles:
        raise CheckpointError(f"{path}: not a LoRA file; it holds no tensor")
    if incomplete := sorted(name for name, found in roles.items() if not _is_complete(found)):
        raise CheckpointError(f"{path}: not a complete LoRA; one of the two matrices of {_list(incomplete)} is missing")
    return [LoraLayer(name, **found) for name, found in roles.items()]


def _is_complete(found: Mapping[str, str]) -> bool:
    """Return whether a layer has both matrices, or whole differences alone."""
    return {"down", "up"} <= found.keys() or found.keys() <= {"diff", "diff_b"}


def _check_stored(tensor: StoredTensor, role: str, path: Path) -> None:
    """Raise an error for an alpha that is not one number, or an update that is not of floats."""
    if role == "alpha" and math.prod(tensor.shape) != 1:
        raise CheckpointError(
            f"{path}: {tensor.name} has the shape {tensor.shape}; only an alpha of one number per layer can be merged"
        )
    if role != "alpha" and tensor.dtype not in FLOATS:
        raise CheckpointError(f"{path}: {tensor.name} is stored as {tensor.dtype}; an update is F32, F16 or BF16")


def _role(key: str, path: Path) -> tuple[str, str]:
    if key.endswith(MODULATION):
        return f"{key.removesuffix(MODULATION)}.modulation", "diff"
    for role, pattern in ROLES.items():
        if found := pattern.search(key):
            return _without_processor(key[: found.start()], found.group(0).startswith("_lora")), role
    kind = next((kind for pattern, kind in OTHER_KINDS.items() if re.search(pattern, key)), "not a tensor of a LoRA")
    raise CheckpointError(
        f"{path}: {key} is {kind}; only LoRA can be merged, two matrices per layer and alpha, or whole differences"
    )


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
    """Return the component that a layer belongs to, and the layer's name in it, without the prefixes of trainers."""
    name, component = name.replace(COMPILED, ""), denoiser
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name, component = name.removeprefix(prefix), PREFIXES[prefix] or component
    return component, name


@dataclass(frozen=True)
class TensorUpdate:
    """The part of a layer's update that belongs to one tensor of the network.

    Args:
        layer: The layer.
        rows: The first row of the layer that is the tensor's, and the row after the last.
        swapped: Whether the two halves of these rows are in the other order in the tensor.
    """

    layer: LoraLayer
    rows: tuple[int, int]
    swapped: bool = False


@dataclass(frozen=True)
class LoraTargets:
    """The tensors that a file's layers update.

    Args:
        found: The update of each published tensor name, by component.
        unknown: The layers without a tensor.
        misshapen: The shapes that do not fit, one line for each layer.
        class_name: The class of the denoiser.
    """

    found: dict[str, dict[str, TensorUpdate]]
    unknown: list[LoraLayer] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    class_name: str = ""


Tensors = Mapping[str, StoredTensor]


def match_layers(
    stored: Tensors, tensors: Mapping[str, Tensors], denoiser: str, class_name: str, path: Path
) -> LoraTargets:
    """Return the tensors that the layers of a LoRA file update.

    Args:
        stored: The tensors of the LoRA file, by key.
        tensors: The stored tensors of each component, by published name.
        denoiser: The component of names without a prefix.
        class_name: The denoiser's class in diffusers.
        path: The LoRA file.

    Raises:
        CheckpointError: Another kind of file, or two layers for one tensor.
    """
    tables = {part: _table(there, class_name if part == denoiser else "") for part, there in tensors.items()}
    targets = LoraTargets({component: {} for component in tensors}, class_name=class_name)
    for layer in parse_layers(stored, path):
        component, name = split_component(layer.name, denoiser)
        table = tables.get(component, {})
        rows = next((table[spelling] for spelling in _spellings(name) if spelling in table), None)
        updates = [] if rows is None else _updates(layer, rows, tensors[component], stored, targets)
        if not updates:
            targets.unknown.append(layer)
        for tensor, update in updates:
            if (other := targets.found[component].setdefault(tensor, update)) is not update:
                raise CheckpointError(f"{path}: {tensor} has two updates, {other.layer.name} and {layer.name}")
    return targets


def _updates(
    layer: LoraLayer, rows: PublishedRows, tensors: Tensors, stored: Tensors, targets: LoraTargets
) -> list[tuple[str, TensorUpdate]]:
    """Return a layer's update of each tensor, and note the shapes that do not fit; empty if it has no such bias."""
    weights = [_weight(name, tensors) for name in rows.layers]
    biases = [f"{name}.bias" for name in rows.layers] if layer.diff_b else []
    if not tensors.keys() >= set(biases):
        return []
    shape = tensors[weights[0]].shape
    swapped = rows.swapped and shape[0] == 2 * shape[1]
    found = []
    for names, keys in ((weights, (layer.down, layer.up, layer.diff)), (biases, (None, None, layer.diff_b))):
        if not any(keys):
            continue
        down, up, diff = (None if key is None else stored[key].shape for key in keys)
        end, shapes = 0, [tensors[name].shape for name in names]
        for name, part in zip(names, shapes, strict=True):
            found.append((name, TensorUpdate(layer, (end, end + part[0]), swapped)))
            end += part[0]
        whole, title = (end, *shapes[0][1:]), " + ".join(names)
        if down is not None and up is not None and not _fits(whole, down, up):
            targets.misshapen.append(f"{title} is {whole}, its update {up} times {down} ({layer.name})")
        if diff is not None and diff != whole:
            targets.misshapen.append(f"{title} is {whole}, its difference {diff} ({layer.name})")
    return found


def _weight(layer: str, tensors: Tensors) -> str:
    """Return the name of a layer's weight; a table outside of layers is its own weight."""
    return f"{layer}.weight" if f"{layer}.weight" in tensors else layer


def _spellings(name: str) -> list[str]:
    """Return a layer's name, with and without the prefix of CLIP's published names."""
    prefixes = [CLIP_PREFIX, CLIP_PREFIX.replace(".", "_")]
    return [name, *(prefix + name for prefix in prefixes), *(name.removeprefix(prefix) for prefix in prefixes)]


def _table(tensors: Tensors, class_name: str) -> dict[str, PublishedRows]:
    """Return a component's layers by their names in diffusers or the publisher's code, with dots or underscores."""
    names = [name.removesuffix(".weight") for name in tensors if not name.endswith(".bias")]
    layers = {name: PublishedRows((name,)) for name in names}
    table: dict[str, PublishedRows] = {}
    for known in (publisher_layers(class_name, layers), layers):  # where one name is in both, diffusers' counts
        table |= {name.replace(".", "_"): rows for name, rows in known.items()} | known
    return table


def check_targets(targets: LoraTargets, path: Path) -> None:
    """Raise an error if a layer matches no tensor, or has the wrong shape.

    Raises:
        CheckpointError: All such layers, in one line.
    """
    if targets.unknown:
        raise CheckpointError(f"{path}: {_unknown(targets)}")
    if targets.misshapen:
        listed = _list(sorted(targets.misshapen), "; ")
        raise CheckpointError(f"{path}: the LoRA does not fit the network: {listed}")


def _unknown(targets: LoraTargets) -> str:
    """Return what is wrong with the layers that match no tensor, and what to change."""
    names = sorted(layer.name for layer in targets.unknown)
    matched = {update.layer.name for found in targets.found.values() for update in found.values()}
    parts = ", ".join(targets.found)
    if matched:
        return (
            f"{len(names)} of its {len(names) + len(matched)} layers are not in {parts}: {_list(names)}; remove them "
            "from the file, or give a model that has them"
        )
    others = [
        family
        for name, (family, pattern) in FAMILIES.items()
        if name != targets.class_name and any(re.search(pattern, layer) for layer in names)
    ]
    trained = f"; these are names of {others[0]}: give that model, or a LoRA of this one" if len(others) == 1 else ""
    return f"none of its {len(names)} layers is in {parts}: {_list(names)}{trained}"


def _fits(shape: tuple[int, ...], down: tuple[int, ...], up: tuple[int, ...]) -> bool:
    """Return whether B A has a tensor's shape; 1 x 1 kernels are matrices."""
    flat_shape, flat_down, flat_up = _drop_unit_dims(shape), _drop_unit_dims(down), _drop_unit_dims(up)
    return len(flat_up) == 2 and flat_down[0] == flat_up[1] and (flat_up[0], *flat_down[1:]) == flat_shape


def _drop_unit_dims(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _list(names: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return between.join(names[:MAX_LISTED]) + more
