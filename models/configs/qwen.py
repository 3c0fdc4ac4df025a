"""The tensors of transformers' Qwen3 and Qwen2.5-VL, and the names that their loaders accept; without torch.

Source: transformers 5, models/qwen3 and models/qwen2_5_vl. Z-Image loads Qwen3 without its language head, Qwen-Image
the whole Qwen2.5-VL: language model, vision tower and head. There is no table for a config.json that gives a size under
another name of it (OTHER_NAMES).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from models.configs.options import FLAG, OPTIONAL_SIZE, SIZE, RefusedOption, RequiredRule, checked_options
from models.configs.shapes import TensorShapes
from models.files import Shape

QWEN3_RULES: Mapping[str, RequiredRule] = {
    "vocab_size": (151936, SIZE),
    "hidden_size": (4096, SIZE),
    "intermediate_size": (22016, SIZE),
    "num_hidden_layers": (32, SIZE),
    "num_attention_heads": (32, SIZE),
    "num_key_value_heads": (32, OPTIONAL_SIZE),
    "head_dim": (128, SIZE),
    "attention_bias": (False, FLAG),
}
LANGUAGE_RULES: Mapping[str, RequiredRule] = {
    "vocab_size": (152064, SIZE),
    "hidden_size": (8192, SIZE),
    "intermediate_size": (29568, SIZE),
    "num_hidden_layers": (80, SIZE),
    "num_attention_heads": (64, SIZE),
    "num_key_value_heads": (8, OPTIONAL_SIZE),
}
VISION_RULES: Mapping[str, RequiredRule] = {
    "depth": (32, SIZE),
    "hidden_size": (3584, SIZE),
    "intermediate_size": (3420, SIZE),
    "num_heads": (16, SIZE),
    "in_channels": (3, SIZE),
    "patch_size": (14, SIZE),
    "spatial_merge_size": (2, SIZE),
    "temporal_patch_size": (2, SIZE),
    "out_hidden_size": (3584, SIZE),
}
OTHER_NAMES = ("num_attention_heads", "num_hidden_layers")  # of the vision tower's num_heads and depth
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def _add_language_model(found: TensorShapes, options: Mapping[str, Any], head: int, biases: Mapping[str, bool]) -> None:
    """Add a language model without its head.

    Args:
        found: The shapes so far.
        options: The sizes.
        head: The number of channels of a head.
        biases: Whether each projection of an attention layer has a bias.
    """
    width, hidden = options["hidden_size"], options["intermediate_size"]
    heads = options["num_attention_heads"]
    keys = heads if options["num_key_value_heads"] is None else options["num_key_value_heads"]
    found[EMBEDDING] = (options["vocab_size"], width)
    for layer in (f"model.layers.{n}" for n in range(options["num_hidden_layers"])):
        attention = f"{layer}.self_attn"
        for part, count in (("q", heads), ("k", keys), ("v", keys)):
            found.linear(f"{attention}.{part}_proj", width, count * head, bias=biases[part])
        found.linear(f"{attention}.o_proj", heads * head, width, bias=biases["o"])
        _add_gated(found, f"{layer}.mlp", width, hidden, bias=False)
        found.gains((f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"), width)
    found.gains(("model.norm",), width)


def _add_gated(found: TensorShapes, name: str, width: int, hidden: int, bias: bool) -> None:
    """Add a gated feed-forward layer."""
    found.linear(f"{name}.gate_proj", width, hidden, bias)
    found.linear(f"{name}.up_proj", width, hidden, bias)
    found.linear(f"{name}.down_proj", hidden, width, bias)


def qwen3_shapes(raw: Mapping[str, object]) -> TensorShapes:
    """Return the shape of every tensor of a Qwen3 language model without its head, by published name.

    Args:
        raw: The content of its config.json.

    Returns:
        The shapes.

    Raises:
        RefusedOption: A value that the model cannot have.
    """
    options = checked_options(raw, QWEN3_RULES)
    found, head = TensorShapes(), options["head_dim"]
    _add_language_model(found, options, head, dict.fromkeys("qkvo", options["attention_bias"]))
    for layer in range(options["num_hidden_layers"]):
        found.gains((f"model.layers.{layer}.self_attn.{norm}" for norm in ("q_norm", "k_norm")), head)
    return found


def qwen2_5_vl_shapes(raw: Mapping[str, object]) -> TensorShapes | None:
    """Return the shape of every tensor of a Qwen2.5-VL, by published name: language model, vision tower and head.

    Args:
        raw: The content of its config.json. The language model's options are under text_config, or at the top.

    Returns:
        The shapes; None if the vision tower has a size under another name.

    Raises:
        RefusedOption: A value that the model cannot have.
    """
    text, tower = _part(raw, "text_config"), _part(raw, "vision_config")
    options = checked_options(raw if text is None else text, LANGUAGE_RULES, "" if text is None else "text_config.")
    vision = checked_options({} if tower is None else tower, VISION_RULES, "vision_config.")
    width, heads = options["hidden_size"], options["num_attention_heads"]
    if width % heads:
        raise RefusedOption("hidden_size", width, f"a multiple of num_attention_heads={heads}")
    if tower is not None and any(name in tower for name in OTHER_NAMES):
        return None
    found = TensorShapes()
    _add_language_model(found, options, width // heads, {"q": True, "k": True, "v": True, "o": False})
    found[HEAD] = (options["vocab_size"], width)
    _add_vision_tower(found, vision)
    return found


def _part(raw: Mapping[str, object], name: str) -> Mapping[str, object] | None:
    """Return the options of a part of a model, or None if the configuration has no such part."""
    part = raw.get(name)
    if part is not None and not isinstance(part, Mapping):
        raise RefusedOption(name, part, "an object")
    return part


def _add_vision_tower(found: TensorShapes, options: Mapping[str, Any]) -> None:
    """Add the vision tower and its projection to the language model's tokens."""
    width, side, merged = options["hidden_size"], options["patch_size"], options["spatial_merge_size"] ** 2
    patch = (width, options["in_channels"], options["temporal_patch_size"], side, side)
    found["visual.patch_embed.proj.weight"] = patch
    for block in (f"visual.blocks.{n}" for n in range(options["depth"])):
        found.gains((f"{block}.norm1", f"{block}.norm2"), width)
        found.linear(f"{block}.attn.qkv", width, 3 * width)
        found.linear(f"{block}.attn.proj", width, width)
        _add_gated(found, f"{block}.mlp", width, options["intermediate_size"], bias=True)
    found.gains(("visual.merger.ln_q",), width)
    found.linear("visual.merger.mlp.0", merged * width, merged * width)
    found.linear("visual.merger.mlp.2", merged * width, options["out_hidden_size"])


def is_tied(raw: Mapping[str, object]) -> bool:
    """Return whether the head of a Qwen2.5-VL is the embedding, so that files need not have both."""
    text = raw.get("text_config")
    return bool(raw.get("tie_word_embeddings")) or (isinstance(text, Mapping) and bool(text.get("tie_word_embeddings")))


def qwen3_as_published(found: Mapping[str, Shape], expected: TensorShapes) -> dict[str, Shape]:
    """Return the stored tensors of a Qwen3 by their published names, without those that are ignored.

    transformers takes names with and without the model's prefix, and ignores frequencies, which are no weights.

    Args:
        found: The stored shapes.
        expected: The shapes of the model's tensors.
    """
    named = {}
    for name, shape in found.items():
        if "rotary_emb.inv_freq" not in name:
            named[f"model.{name}" if f"model.{name}" in expected else name] = shape
    return named


def qwen2_5_vl_as_published(found: Mapping[str, Shape], expected: TensorShapes, tied: bool) -> dict[str, Shape]:
    """Return the stored tensors of a Qwen2.5-VL by their published names, without those that are ignored.

    transformers has the language model and the vision tower in `model`; published files have them side by side.

    Args:
        found: The stored shapes.
        expected: The shapes of the model's tensors.
        tied: Whether the head is the embedding.
    """
    named = {}
    for name, shape in found.items():
        published = re.sub(r"^(model\.)?visual\.", "visual.", name)
        published = re.sub(r"^(model\.)?language_model\.", "model.", published)
        if "rotary_emb.inv_freq" not in name:
            named[published if published in expected else name] = shape
    if tied and (one := named.get(EMBEDDING, named.get(HEAD))) is not None:
        named = {EMBEDDING: one, HEAD: one} | named
    return named
