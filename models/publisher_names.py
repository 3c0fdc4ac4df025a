"""The names of a network's layers in its publisher's own code, and the layers of diffusers that they are.

LoRA files are often published in these names. Some layers are fused there: their rows are those of several layers of
diffusers, one after the other. Read without torch.

Sources: the conversions of diffusers 0.42.1 (loaders/single_file_utils.py, loaders/lora_conversion_utils.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

HALVES = "halves "  # before a layer whose two halves, shift and scale, have the other order in diffusers


@dataclass(frozen=True)
class PublishedRows:
    """The layers of diffusers whose rows make up one layer of the publisher.

    Args:
        layers: The layers of diffusers, in the order of their rows.
        swapped: Whether the two halves of the rows, shift and scale, have the other order in diffusers.
    """

    layers: tuple[str, ...]
    swapped: bool = False


# The publisher's layer, and after it the layers of diffusers; `{}` is the number of a block.
FLUX = {
    "double_blocks.{}.img_attn.qkv": "transformer_blocks.{}.attn: to_q to_k to_v",
    "double_blocks.{}.txt_attn.qkv": "transformer_blocks.{}.attn: add_q_proj add_k_proj add_v_proj",
    "double_blocks.{}.img_attn.proj": "transformer_blocks.{}.attn: to_out.0",
    "double_blocks.{}.txt_attn.proj": "transformer_blocks.{}.attn: to_add_out",
    "double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff: net.0.proj",
    "double_blocks.{}.img_mlp.2": "transformer_blocks.{}.ff: net.2",
    "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}.ff_context: net.0.proj",
    "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}.ff_context: net.2",
    "double_blocks.{}.img_mod.lin": "transformer_blocks.{}: norm1.linear",
    "double_blocks.{}.txt_mod.lin": "transformer_blocks.{}: norm1_context.linear",
    "single_blocks.{}.linear1": "single_transformer_blocks.{}: attn.to_q attn.to_k attn.to_v proj_mlp",
    "single_blocks.{}.linear2": "single_transformer_blocks.{}: proj_out",
    "single_blocks.{}.modulation.lin": "single_transformer_blocks.{}: norm.linear",
    "img_in": ": x_embedder",
    "txt_in": ": context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder: linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder: linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder: linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder: linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder: linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder: linear_2",
    "final_layer.linear": ": proj_out",
    "final_layer.adaLN_modulation.1": HALVES + ": norm_out.linear",
    # XLabs' trainer: its attention processors, 1 for the image and 2 for the text
    "double_blocks.{}.qkv_lora1": "transformer_blocks.{}.attn: to_q to_k to_v",
    "double_blocks.{}.qkv_lora2": "transformer_blocks.{}.attn: add_q_proj add_k_proj add_v_proj",
    "double_blocks.{}.proj_lora1": "transformer_blocks.{}.attn: to_out.0",
    "double_blocks.{}.proj_lora2": "transformer_blocks.{}.attn: to_add_out",
    "single_blocks.{}.qkv": "single_transformer_blocks.{}.attn: to_q to_k to_v",
    "single_blocks.{}.proj": "single_transformer_blocks.{}: proj_out",
}
SD3 = {
    "joint_blocks.{}.x_block.attn.qkv": "transformer_blocks.{}.attn: to_q to_k to_v",
    "joint_blocks.{}.x_block.attn2.qkv": "transformer_blocks.{}.attn2: to_q to_k to_v",
    "joint_blocks.{}.context_block.attn.qkv": "transformer_blocks.{}.attn: add_q_proj add_k_proj add_v_proj",
    "joint_blocks.{}.x_block.attn.proj": "transformer_blocks.{}.attn: to_out.0",
    "joint_blocks.{}.x_block.attn2.proj": "transformer_blocks.{}.attn2: to_out.0",
    "joint_blocks.{}.context_block.attn.proj": "transformer_blocks.{}.attn: to_add_out",
    "joint_blocks.{}.x_block.mlp.fc1": "transformer_blocks.{}.ff: net.0.proj",
    "joint_blocks.{}.x_block.mlp.fc2": "transformer_blocks.{}.ff: net.2",
    "joint_blocks.{}.context_block.mlp.fc1": "transformer_blocks.{}.ff_context: net.0.proj",
    "joint_blocks.{}.context_block.mlp.fc2": "transformer_blocks.{}.ff_context: net.2",
    "joint_blocks.{}.x_block.adaLN_modulation.1": "transformer_blocks.{}: norm1.linear",
    "joint_blocks.{}.context_block.adaLN_modulation.1": HALVES + "transformer_blocks.{}: norm1_context.linear",
    "x_embedder.proj": "pos_embed: proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder: linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder: linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder: linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder: linear_2",
    "final_layer.linear": ": proj_out",
    "final_layer.adaLN_modulation.1": HALVES + ": norm_out.linear",
}
WAN = {
    **{
        f"blocks.{{}}.{own}.{part}": f"blocks.{{}}.{theirs}: {layer}"
        for own, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, layer in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
    **{
        f"blocks.{{}}.{own}.{norm}": f"blocks.{{}}.{theirs}: {norm}"
        for own, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for norm in ("norm_q", "norm_k")
    },
    "blocks.{}.ffn.0": "blocks.{}.ffn: net.0.proj",
    "blocks.{}.ffn.2": "blocks.{}.ffn: net.2",
    "blocks.{}.norm3": "blocks.{}: norm2",
    "blocks.{}.modulation": "blocks.{}: scale_shift_table",
    "text_embedding.0": "condition_embedder.text_embedder: linear_1",
    "text_embedding.2": "condition_embedder.text_embedder: linear_2",
    "time_embedding.0": "condition_embedder.time_embedder: linear_1",
    "time_embedding.2": "condition_embedder.time_embedder: linear_2",
    "time_projection.1": "condition_embedder: time_proj",
    "head.head": ": proj_out",
    "head.modulation": ": scale_shift_table",
}
Z_IMAGE = {
    **{
        f"{stack}.{{}}.attention.{own}": f"{stack}.{{}}.attention: {layers}"
        for stack in ("layers", "noise_refiner", "context_refiner")
        for own, layers in (
            ("qkv", "to_q to_k to_v"),
            ("out", "to_out.0"),
            ("q_norm", "norm_q"),
            ("k_norm", "norm_k"),
        )
    },
    "x_embedder": ": all_x_embedder.2-1",
    "final_layer.linear": ": all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": ": all_final_layer.2-1.adaLN_modulation.1",
}
PIXART = {
    "blocks.{}.attn.qkv": "transformer_blocks.{}.attn1: to_q to_k to_v",
    "blocks.{}.attn.proj": "transformer_blocks.{}.attn1: to_out.0",
    "blocks.{}.cross_attn.q_linear": "transformer_blocks.{}.attn2: to_q",
    "blocks.{}.cross_attn.kv_linear": "transformer_blocks.{}.attn2: to_k to_v",
    "blocks.{}.cross_attn.proj": "transformer_blocks.{}.attn2: to_out.0",
    "blocks.{}.mlp.fc1": "transformer_blocks.{}.ff: net.0.proj",
    "blocks.{}.mlp.fc2": "transformer_blocks.{}.ff: net.2",
    "x_embedder.proj": "pos_embed: proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder: linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder: linear_2",
    "t_block.1": "adaln_single: linear",
    "y_embedder.y_proj.fc1": "caption_projection: linear_1",
    "y_embedder.y_proj.fc2": "caption_projection: linear_2",
    "final_layer.linear": ": proj_out",
}
UNET = {
    "time_embed.0": "time_embedding: linear_1",
    "time_embed.2": "time_embedding: linear_2",
    "label_emb.0.0": "add_embedding: linear_1",
    "label_emb.0.2": "add_embedding: linear_2",
    "input_blocks.0.0": ": conv_in",
    "out.0": ": conv_norm_out",
    "out.2": ": conv_out",
}
TABLES: Mapping[str, Mapping[str, str]] = {
    "FluxTransformer2DModel": FLUX,
    "SD3Transformer2DModel": SD3,
    "WanTransformer3DModel": WAN,
    "ZImageTransformer2DModel": Z_IMAGE,
    "PixArtTransformer2DModel": PIXART,
    "Transformer2DModel": PIXART,
    "UNet2DConditionModel": UNET,
}
RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def publisher_layers(class_name: str, layers: Iterable[str]) -> dict[str, PublishedRows]:
    """Return the layers of a network by the publisher's names.

    Args:
        class_name: The network's class in diffusers.
        layers: The names of its layers in diffusers.

    Returns:
        What each of the publisher's layers is in diffusers; empty if the publisher has no other names.
    """
    there = set(layers)
    table = TABLES.get(class_name, {})
    found = {own: rows for name, text in table.items() for own, rows in _numbered(name, text, there)}
    if class_name == "UNet2DConditionModel":
        found |= {own: PublishedRows((layer,)) for own, layer in _ldm_layers(there)}
    return found


def _numbered(name: str, text: str, there: set[str]) -> Iterator[tuple[str, PublishedRows]]:
    """Yield one row of a table for every block that the network has."""
    parent, _, parts = text.removeprefix(HALVES).partition(":")
    layers = [f"{parent}.{part}" if parent else part for part in parts.split()]
    pattern = re.compile(re.escape(layers[0]).replace(r"\{\}", r"(\d+)"))
    for number in (found.groups() for layer in there if (found := pattern.fullmatch(layer))):
        whole = tuple(layer.format(*number) for layer in layers)
        if there.issuperset(whole):
            yield name.format(*number), PublishedRows(whole, text.startswith(HALVES))


def _ldm_layers(there: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the layers of a UNet's blocks in the names of latent diffusion (LDM, SGM), and in diffusers' names."""
    numbers = [int(found[1]) for layer in there if (found := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", layer))]
    resnets = max(numbers, default=-1) + 1  # of a block on the way down; one more on the way up
    for layer in sorted(there):
        stack, *rest = layer.split(".")
        if stack == "mid_block":
            kind, number, *part = rest
            yield _ldm_name("middle_block", 1 if kind == "attentions" else 2 * int(number), kind, part), layer
        elif stack in ("down_blocks", "up_blocks"):
            block, kind, number, *part = rest
            up = stack == "up_blocks"
            last = resnets if kind in ("downsamplers", "upsamplers") else int(number)
            position = int(block) * (resnets + 1) + last + (0 if up else 1)
            inner = _inner_number(stack, block, kind, there)
            yield _ldm_name(f"{'output' if up else 'input'}_blocks.{position}", inner, kind, part), layer


def _inner_number(stack: str, block: str, kind: str, there: set[str]) -> int:
    """Return the position in a block of LDM: the resnet is first, then attention, then the layer that changes size."""
    if kind == "attentions":
        return 1
    if kind != "upsamplers":
        return 0
    return 1 + any(layer.startswith(f"{stack}.{block}.attentions.") for layer in there)


def _ldm_name(block: str, inner: int, kind: str, part: list[str]) -> str:
    own = ".".join(part)
    if kind == "resnets":
        own = RESNET.get(own, own)
    if kind == "downsamplers":
        own = "op"
    return f"{block}.{inner}.{own}"
