"""The tensors of transformers' text encoders, and the names that their loader accepts; without torch.

Source: transformers 5, models/clip, models/t5 and models/umt5; Qwen's are in `models.configs.qwen`. There is no table
for a config.json that gives a size under another name of it (OTHER_NAMES), nor for another model_type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from models.configs import qwen
from models.configs.options import FLAG, SIZE, RefusedOption, RequiredRule, Values, checked_options, optional
from models.configs.shapes import TensorShapes
from models.files import Shape

NAME = Values("a name", lambda value: isinstance(value, str))
OPTIONAL_FLAG = Values("true, false or null", optional(FLAG))
CLIP_RULES: Mapping[str, RequiredRule] = {
    "vocab_size": (49408, SIZE),
    "hidden_size": (512, SIZE),
    "intermediate_size": (2048, SIZE),
    "projection_dim": (512, SIZE),
    "num_hidden_layers": (12, SIZE),
    "max_position_embeddings": (77, SIZE),
    "num_attention_heads": (8, SIZE),
}
T5_RULES: Mapping[str, RequiredRule] = {
    "vocab_size": (32128, SIZE),
    "d_model": (512, SIZE),
    "d_kv": (64, SIZE),
    "d_ff": (2048, SIZE),
    "num_layers": (6, SIZE),
    "num_heads": (8, SIZE),
    "relative_attention_num_buckets": (32, SIZE),
    "feed_forward_proj": ("relu", NAME),
    "is_gated_act": (None, OPTIONAL_FLAG),  # without it, feed_forward_proj decides
}
UMT5_RULES: Mapping[str, RequiredRule] = {
    **T5_RULES,
    "vocab_size": (250112, SIZE),
    "d_ff": (1024, SIZE),
    "num_layers": (8, SIZE),
    "num_heads": (6, SIZE),
    "feed_forward_proj": ("gated-gelu", NAME),
}
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "clip_text_model": (),
    "t5": ("hidden_size", "num_attention_heads", "num_hidden_layers", "head_dim"),
    "umt5": ("hidden_size", "num_attention_heads", "num_hidden_layers", "head_dim"),
}
SHARED, EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"  # one tensor of T5, stored under either name


def clip_shapes(options: Mapping[str, Any], projected: bool) -> TensorShapes:
    """Return the shape of every tensor of a CLIP text model, by published name.

    Args:
        options: The values of the options in CLIP_RULES.
        projected: Whether the pooled vector goes through a projection.
    """
    found, width = TensorShapes(), options["hidden_size"]
    found["text_model.embeddings.token_embedding.weight"] = (options["vocab_size"], width)
    found["text_model.embeddings.position_embedding.weight"] = (options["max_position_embeddings"], width)
    for layer in (f"text_model.encoder.layers.{n}" for n in range(options["num_hidden_layers"])):
        found.projections((f"{layer}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")), width)
        found.norm(f"{layer}.layer_norm1", width)
        found.linear(f"{layer}.mlp.fc1", width, options["intermediate_size"])
        found.linear(f"{layer}.mlp.fc2", options["intermediate_size"], width)
        found.norm(f"{layer}.layer_norm2", width)
    found.norm("text_model.final_layer_norm", width)
    if projected:
        found.linear("text_projection", width, options["projection_dim"], bias=False)
    return found


def t5_shapes(options: Mapping[str, Any], every_layer: bool) -> TensorShapes:
    """Return the shape of every tensor of a T5 encoder, by published name.

    Args:
        options: The values of the options in T5_RULES.
        every_layer: Whether every layer has its own relative positions, as those of UMT5 do, and not the first alone.
    """
    found, width, hidden = TensorShapes(), options["d_model"], options["d_ff"]
    inner, gated = options["num_heads"] * options["d_kv"], options["is_gated_act"]
    if gated is None:
        gated = options["feed_forward_proj"].startswith("gated-")
    found[SHARED] = (options["vocab_size"], width)
    for n in range(options["num_layers"]):
        attention, feed_forward = (f"encoder.block.{n}.layer.{part}" for part in range(2))
        for part in "qkv":
            found.linear(f"{attention}.SelfAttention.{part}", width, inner, bias=False)
        found.linear(f"{attention}.SelfAttention.o", inner, width, bias=False)
        if every_layer or n == 0:
            positions = f"{attention}.SelfAttention.relative_attention_bias.weight"
            found[positions] = (options["relative_attention_num_buckets"], options["num_heads"])
        for part in ("wi_0", "wi_1") if gated else ("wi",):
            found.linear(f"{feed_forward}.DenseReluDense.{part}", width, hidden, bias=False)
        found.linear(f"{feed_forward}.DenseReluDense.wo", hidden, width, bias=False)
        found.gains((f"{attention}.layer_norm", f"{feed_forward}.layer_norm"), width)
    found.gains(("encoder.final_layer_norm",), width)
    return found


def tensor_shapes(raw: Mapping[str, object], projected: bool = False) -> TensorShapes | None:
    """Return the shape of every tensor of a text encoder, by published name.

    Args:
        raw: The content of its config.json.
        projected: Whether CLIP's pooled vector goes through a projection.

    Returns:
        The shapes; None if there is no table for it.

    Raises:
        RefusedOption: A value that the encoder cannot have.
    """
    kind = str(raw.get("model_type"))
    if kind == "qwen3":
        return qwen.qwen3_shapes(raw)
    if kind == "qwen2_5_vl":
        return qwen.qwen2_5_vl_shapes(raw)
    if kind not in OTHER_NAMES or any(name in raw for name in OTHER_NAMES[kind]):
        return None
    options = checked_options(raw, {"clip_text_model": CLIP_RULES, "t5": T5_RULES, "umt5": UMT5_RULES}[kind])
    if kind != "clip_text_model":
        return t5_shapes(options, every_layer=kind == "umt5")
    width, heads = options["hidden_size"], options["num_attention_heads"]
    if width % heads:
        raise RefusedOption("hidden_size", width, f"a multiple of num_attention_heads={heads}")
    return clip_shapes(options, projected)


def clip_as_published(found: Mapping[str, Shape], expected: TensorShapes, projected: bool) -> dict[str, Shape]:
    """Return the stored tensors of a CLIP text model by their published names, without those that are ignored.

    transformers takes names with and without the model's prefix, and ignores positions, which are no weights.

    Args:
        found: The stored shapes.
        expected: The shapes of the model's tensors.
        projected: Whether the pooled vector goes through a projection.
    """
    prefix = r"^(text_model\.)*" if projected else r"^(text_model\.|clip\.)?"
    named = {}
    for name, shape in found.items():
        bare = re.sub(prefix, "", name)
        published = bare if bare.startswith("text_projection.") else f"text_model.{bare}"
        if not re.search(r"(^|\.)position_ids$", name):
            named[published if published in expected else name] = shape
    return named


def t5_as_published(found: Mapping[str, Shape], expected: TensorShapes, decoder: bool) -> dict[str, Shape]:
    """Return the stored tensors of a T5 encoder by their published names, without those that are ignored.

    transformers takes names with and without the model's prefix. The embedding has one of two names, or both.

    Args:
        found: The stored shapes.
        expected: The shapes of the encoder's tensors.
        decoder: Whether a decoder's tensors are ignored; UMT5's are not.
    """
    named = {}
    for name, shape in found.items():
        bare = name.removeprefix("transformer.")
        if not (decoder and "decoder" in name):
            named[bare if bare in expected or bare == EMBEDDING else name] = shape
    if EMBEDDING in named and named.get(SHARED, named[EMBEDDING]) == named[EMBEDDING]:
        named[SHARED] = named.pop(EMBEDDING)
    return named


def as_published(
    found: Mapping[str, Shape], expected: TensorShapes, raw: Mapping[str, object], projected: bool = False
) -> dict[str, Shape]:
    """Return the stored tensors of a text encoder by their published names, without those that are ignored.

    Args:
        found: The stored shapes.
        expected: The shapes of the encoder's tensors.
        raw: The content of its config.json.
        projected: Whether CLIP's pooled vector goes through a projection.
    """
    kind = raw.get("model_type")
    if kind == "clip_text_model":
        return clip_as_published(found, expected, projected)
    if kind == "qwen3":
        return qwen.qwen3_as_published(found, expected)
    if kind == "qwen2_5_vl":
        return qwen.qwen2_5_vl_as_published(found, expected, qwen.is_tied(raw))
    return t5_as_published(found, expected, decoder=kind == "t5")
