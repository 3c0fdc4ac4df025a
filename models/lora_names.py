"""Which tensors of a checkpoint a LoRA file updates: from names and shapes alone, without torch.

A layer's update is two matrices, down (A) and up (B), and sometimes a number alpha. Trainers call them by several
names; the layer's own name is the published one with dots (diffusers, PEFT) or with underscores (kohya).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.files import CheckpointError, Stored

SHOWN = 6
ROLES = {
    "down": re.compile(r"(\.lora_A(\.\w+)?|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight$"),
    "up": re.compile(r"(\.lora_B(\.\w+)?|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight$"),
    "alpha": re.compile(r"(([._]lora|\.lora_linear_layer)\.down\.weight)?\.alpha$"),
}
KINDS = {
    r"\.(dora_scale|lora_magnitude_vector)\b": "DoRA",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.b?oft_": "OFT",
    r"\.lora_mid\.": "LoCon with a middle matrix",
    r"\.lora_embedding_": "LoRA of an embedding",
    r"\.lora_(B|up)(\.\w+)?\.bias$": "LoRA with a bias",
    r"\.diff(_b)?$": "a whole difference",
}
CONVERTERS = {  # from a denoiser's class to diffusers' loader that knows the names its first publishers gave
    "UNet2DConditionModel": "StableDiffusionXLLoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
    "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
    "WanTransformer3DModel": "WanLoraLoaderMixin",
}
DENOISER = ("base_model.model.", "diffusion_model.", "transformer.", "unet.", "lora_unet_", "lora_transformer_")
OTHERS = {
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
ENCODER_PARTS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
CLIP_PREFIX = "text_model."  # of CLIP's published names, which newer files leave out


@dataclass(frozen=True)
class Layer:
    """One layer's update, by the names that its matrices have in the file.

    Args:
        name: the layer's own name in the file.
        down: of A, (rank, in) or (rank, in, height, width).
        up: of B, (out, rank) or (out, rank, 1, 1).
        alpha: of the number that the update is scaled by, over the rank; None where it is not in the file.
    """

    name: str
    down: str
    up: str
    alpha: str | None = None


def layers(keys: Iterable[str], path: Path) -> list[Layer]:
    """The layers of a LoRA file.

    Raises:
        CheckpointError: another kind of file, or a layer with one matrix of the two.
    """
    roles: dict[str, dict[str, str]] = {}
    for key in keys:
        name, role = _role(key, path)
        if role in roles.setdefault(name, {}):
            raise CheckpointError(f"{path}: {name} has two updates, {roles[name][role]} and {key}")
        roles[name][role] = key
    if not roles:
        raise CheckpointError(f"{path}: no LoRA; there is no tensor in it")
    if half := sorted(name for name, found in roles.items() if not {"down", "up"} <= found.keys()):
        raise CheckpointError(f"{path}: not a whole LoRA; one of the two matrices of {_list(half)} is missing")
    return [Layer(name, found["down"], found["up"], found.get("alpha")) for name, found in roles.items()]


def _role(key: str, path: Path) -> tuple[str, str]:
    for role, pattern in ROLES.items():
        if found := pattern.search(key):
            return _tidy(key[: found.start()], found.group(0).startswith("_lora")), role
    kind = next((kind for pattern, kind in KINDS.items() if re.search(pattern, key)), "no matrix of a LoRA")
    raise CheckpointError(f"{path}: {key} is {kind}; what is merged here is LoRA, two matrices a layer and alpha")


def _tidy(name: str, processor: bool) -> str:
    """A layer's name without what diffusers' attention processors once added to it."""
    name = name.replace(".processor.", ".")
    parent, _, last = name.rpartition(".")
    if not processor:
        return name
    if name.startswith("text_encoder"):
        return f"{parent}.{ENCODER_PARTS.get(last, last)}"
    return f"{name}.0" if last == "to_out" else name


def owner(name: str, denoiser: str) -> tuple[str, str]:
    """The component that a layer belongs to, and its name there."""
    for prefix, component in OTHERS.items():
        if name.startswith(prefix):
            return component, name.removeprefix(prefix)
    for prefix in DENOISER:
        if name.startswith(prefix):
            return denoiser, name.removeprefix(prefix)
    return denoiser, name


@dataclass(frozen=True)
class Targets:
    """What a file's layers update.

    Args:
        found: by component, each published tensor name and its layer.
        unknown: layers for which there is no tensor.
    """

    found: dict[str, dict[str, Layer]]
    unknown: list[Layer]


def resolve(found: Sequence[Layer], tensors: Mapping[str, Iterable[str]], denoiser: str, path: Path) -> Targets:
    """The tensors that layers update.

    Args:
        found: the layers of a file.
        tensors: by component, the published names of its tensors.
        denoiser: the component that names without a prefix belong to.
        path: the file.

    Raises:
        CheckpointError: two layers for one tensor.
    """
    tables = {component: _table(names) for component, names in tensors.items()}
    targets: dict[str, dict[str, Layer]] = {component: {} for component in tensors}
    unknown: list[Layer] = []
    for layer in found:
        component, name = owner(layer.name, denoiser)
        table = tables.get(component, {})
        tensor = next((table[spelling] for spelling in _spellings(name) if spelling in table), None)
        if tensor is None:
            unknown.append(layer)
        elif tensor in targets[component]:
            names = f"{targets[component][tensor].name} and {layer.name}"
            raise CheckpointError(f"{path}: {tensor} has two updates, {names}")
        else:
            targets[component][tensor] = layer
    return Targets(targets, unknown)


def _spellings(name: str) -> list[str]:
    """A layer's name, with and without what CLIP's published names begin with."""
    prefixes = [CLIP_PREFIX, CLIP_PREFIX.replace(".", "_")]
    return [name, *(prefix + name for prefix in prefixes), *(name.removeprefix(prefix) for prefix in prefixes)]


def _table(names: Iterable[str]) -> dict[str, str]:
    """A component's layers by their names with dots and with underscores."""
    table = {}
    for name in names:
        if name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            table[layer.replace(".", "_")] = table[layer] = name
    return table


def refuse_unknown(targets: Targets, path: Path) -> None:
    """Refuses layers that match nothing.

    Raises:
        CheckpointError: their names, in one line.
    """
    if targets.unknown:
        names = _list(sorted(layer.name for layer in targets.unknown))
        parts = ", ".join(targets.found)
        raise CheckpointError(f"{path}: no layer of {parts} matches {names}; was the LoRA trained on this model?")


def refuse_misfits(wrong: Sequence[str], path: Path) -> None:
    """Refuses layers whose matrices have other shapes than their tensors need.

    Raises:
        CheckpointError: all of them, in one line.
    """
    if wrong:
        raise CheckpointError(f"{path}: the LoRA does not fit the network: {_list(sorted(wrong), '; ')}")


def misfits(
    targets: Targets, tensors: Mapping[str, Mapping[str, Stored]], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What is wrong with the shapes of updates.

    Args:
        targets: which layers update which tensors.
        tensors: by component and published name.
        shapes: of the file's tensors, by key.
    """
    wrong = [
        _misfit(name, tensors[part][name].shape, shapes[layer.down], shapes[layer.up])
        for part, found in targets.found.items()
        for name, layer in found.items()
    ]
    return [line for line in wrong if line is not None]


def _misfit(tensor: str, shape: tuple[int, ...], down: tuple[int, ...], up: tuple[int, ...]) -> str | None:
    """What is wrong with the shapes of an update, or None: B A has to be the tensor's, 1 x 1 kernels being matrices."""
    flat_shape, flat_down, flat_up = _plain(shape), _plain(down), _plain(up)
    if len(flat_up) == 2 and flat_down[0] == flat_up[1] and (flat_up[0], *flat_down[1:]) == flat_shape:
        return None
    return f"{tensor} is {shape}, its update {up} times {down}"


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _list(names: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return between.join(names[:SHOWN]) + more
