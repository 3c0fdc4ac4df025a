"""The tensors of the networks that diffusers and transformers build, by their config.json; without torch.

They tell whether weights and config.json belong together before a process starts. Where there is no table of all
tensors, a few sizes are compared: for a config.json with an option that its table does not know. The ranks compare the
rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from models.configs import autoencoder_kl, text_encoders, unet_conditional, unet_unconditional, video_autoencoders
from models.configs.options import RefusedOption
from models.configs.shapes import TensorShapes
from models.files import CheckpointError, StoredTensor, check_names_and_shapes, read_json
from models.names import LEGACY_NAMES

EMBEDDINGS = ("token_embedding.weight", "shared.weight", "embed_tokens.weight")  # the ends of their names
CLIP = (r"encoder\.layers\.(\d+)\.", "num_hidden_layers", ("vocab_size", "hidden_size"))
T5 = (r"encoder\.block\.(\d+)\.", "num_layers", ("vocab_size", "d_model"))
QWEN = (r"layers\.(\d+)\.", "num_hidden_layers", ("vocab_size", "hidden_size"))
TEXT_ENCODERS = {"clip_text_model": CLIP, "t5": T5, "umt5": T5, "qwen3": QWEN}
"""By model_type: the pattern of a layer's number, the key of their count, and the keys of the embedding's sizes."""

DIFFUSERS = {  # by _class_name: a kernel, and the shape of it after the first two numbers
    "UNet2DConditionModel": (("conv_in", "first", "in_channels"), ("conv_out", "out_channels", "first")),
    "UNet2DModel": (("conv_in", "first", "in_channels"), ("conv_out", "out_channels", "first")),
    "AutoencoderKL": (("decoder.conv_in", "last", "latent_channels"), ("decoder.conv_out", "out_channels", "first")),
}

TABLES: Mapping[str, Callable[[Mapping[str, object]], TensorShapes | None]] = {
    "UNet2DConditionModel": unet_conditional.tensor_shapes,
    "UNet2DModel": unet_unconditional.tensor_shapes,
    "AutoencoderKL": autoencoder_kl.tensor_shapes,
    "AutoencoderKLWan": video_autoencoders.wan_shapes,
    "AutoencoderKLQwenImage": video_autoencoders.qwen_image_shapes,
}
"""The tensors of diffusers' networks, by _class_name."""
PROJECTED = {"sd3": ("text_encoder", "text_encoder_2"), "sdxl": ("text_encoder_2",)}
"""The CLIP text models whose pooled vector goes through a projection, by architecture."""


def expected_of_library(folder: Path, projected: bool = False) -> TensorShapes | None:
    """Check the config.json of a library's network, and return the shapes of its tensors by published name.

    Args:
        folder: The folder with config.json.
        projected: Whether the pooled vector of a CLIP text model goes through a projection.

    Returns:
        The shapes; None if there is no table for it.

    Raises:
        CheckpointError: A value from which the library can build no network, in one line.
    """
    raw = read_json(folder / "config.json")
    table = TABLES.get(str(raw.get("_class_name")))
    try:
        return text_encoders.tensor_shapes(raw, projected) if table is None else table(raw)
    except RefusedOption as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None


def check_weights_of_library(
    folder: Path, stored: Mapping[str, StoredTensor], weights: Path, projected: bool = False
) -> None:
    """Raise an error if the tensors of a library's network are not those of its config.json.

    Args:
        folder: The folder with config.json.
        stored: The stored tensors, by name.
        weights: The folder or file of the weights.
        projected: Whether the pooled vector of a CLIP text model goes through a projection.

    Raises:
        CheckpointError: The tensors, or a value in config.json, in one line.
    """
    expected = expected_of_library(folder, projected)
    check_sizes_of_weights(folder, stored, weights)
    if expected is None:
        return
    raw, found = read_json(folder / "config.json"), {name: tensor.shape for name, tensor in stored.items()}
    if raw.get("_class_name") in TABLES:
        found = {LEGACY_NAMES.to_native(name): shape for name, shape in found.items()}
    else:
        found = text_encoders.as_published(found, expected, raw, projected)
    check_names_and_shapes(expected, found, f"{weights} (sizes of {folder / 'config.json'})")


def check_sizes_of_weights(folder: Path, stored: Mapping[str, StoredTensor], weights: Path) -> None:
    """Raise an error if a few tensors of a library's network do not have the sizes in its config.json.

    Args:
        folder: The folder with config.json.
        stored: The stored tensors, by name.
        weights: The folder or file of the weights.

    Raises:
        CheckpointError: The tensor, its shape, and the sizes in config.json.
    """
    raw = read_json(folder / "config.json")
    sizes: Iterator[tuple[str, Any, Any]] = (
        _kernels(raw, stored) if raw.get("_class_name") in DIFFUSERS else _text_sizes(raw, stored)
    )
    for what, found, expected in sizes:
        if found != expected:
            raise CheckpointError(
                f"{weights}: the weights do not fit the network: {what} is {found}, and {expected} by "
                f"{folder / 'config.json'}"
            )


def _kernels(raw: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Any, Any]]:
    """Yield a kernel's name, its first two sizes in the file, and those of the configuration."""
    blocks = raw.get("block_out_channels")
    known = dict(raw) | ({"first": blocks[0], "last": blocks[-1]} if isinstance(blocks, list) and blocks else {})
    for name, *keys in DIFFUSERS[raw["_class_name"]]:
        if known.keys() >= set(keys):
            found = stored.get(f"{name}.weight")
            yield f"{name}.weight", None if found is None else found.shape[:2], tuple(known[key] for key in keys)


def _text_sizes(raw: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Any, Any]]:
    """Yield an embedding's shape and the number of layers, in the file and by the configuration."""
    if raw.get("model_type") not in TEXT_ENCODERS:
        return
    layer, depth, sizes = TEXT_ENCODERS[raw["model_type"]]
    if raw.keys() >= set(sizes):
        found = next((tensor.shape for name, tensor in stored.items() if name.endswith(EMBEDDINGS)), None)
        yield "the embedding of tokens", found, tuple(raw[size] for size in sizes)
    numbers = {int(match[1]) for name in stored if (match := re.search(layer, name))}
    if depth in raw:
        yield "the number of layers", len(numbers), raw[depth]
