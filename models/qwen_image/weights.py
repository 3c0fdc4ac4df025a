"""The map between the names and sizes of a checkpoint in diffusers' layout and those of the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.files import CheckpointError, check_sizes, read_network_config, rotary_axes
from models.names import JOINT_ATTENTION, NameMap
from models.plan import Dims, ParallelPlan, PrecomputePlan, Stack
from models.qwen_image.network import PATCH, QwenImageConfig

NAMES = NameMap(  # diffusers' QwenImageTransformer2DModel on the left, this network on the right
    (
        ("time_text_embed.timestep_embedder", "time"),
        ("txt_norm", "text_norm"),
        ("txt_in", "text_in"),
        ("img_in", "image_in"),
        ("transformer_blocks", "blocks"),
        ("img_mod.1", "modulation"),
        ("txt_mod.1", "text_modulation"),
        *JOINT_ATTENTION,
        ("img_mlp.net.0.proj", "feed_forward.up"),
        ("img_mlp.net.2", "feed_forward.down"),
        ("txt_mlp.net.0.proj", "text_feed_forward.up"),
        ("txt_mlp.net.2", "text_feed_forward.down"),
        ("norm_out.linear", "head_modulation"),
        ("proj_out", "project_out"),
    )
)
PLAN = ParallelPlan(
    heads="heads",
    stacks=(
        Stack(
            "blocks",
            {
                "x_BLD": Dims(tokens=1),
                "text_BSD": Dims(tokens=1),
                "time_BD": Dims(),
                "rope_2LF": Dims(batch=None, tokens=1),
                "text_rope_2SF": Dims(batch=None, tokens=1),
                "mask_BS": Dims(tokens=1),
            },
            outputs=("x_BLD", "text_BSD"),
            streams=("text_BSD", "x_BLD"),
            signal="heads",
        ),
    ),
    column=("blocks.*.to_q", "blocks.*.to_k", "blocks.*.to_v", "blocks.*.up"),
    row=("blocks.*.to_out", "blocks.*.text_to_out", "blocks.*.down"),
)
PRECOMPUTE = PrecomputePlan(
    time_chains=(("blocks.*.modulation",), ("blocks.*.text_modulation",), ("head_modulation",)),
    time_argument="time_BD",
)
CLASS_NAME = "QwenImageTransformer2DModel"
DEFAULTS: dict[str, Any] = {  # diffusers' defaults of the keys that a config.json omits
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56),
}
REFUSED = {
    "guidance_embeds": "a guidance-distilled network, which diffusers' class does not run either",
    "use_additional_t_cond": "the second time embedding of Qwen-Image-Layered",
    "use_layer3d_rope": "the layers' positions of Qwen-Image-Layered",
}


def read_config(folder: Path) -> QwenImageConfig:
    """Read the sizes from a `config.json` of diffusers' `QwenImageTransformer2DModel`.

    `zero_cond_t` is accepted without effect: it gives the tokens of images to edit another time, and there are none
    here.

    Args:
        folder: The network's folder.

    Returns:
        The sizes.

    Raises:
        CheckpointError: No such file, another class, or an option that this network does not support.
    """
    path, raw = folder / "config.json", read_network_config(folder, (CLASS_NAME,), DEFAULTS)
    for option, what in REFUSED.items():
        if raw.get(option):
            raise CheckpointError(f"{path}: {option} ({what}) is not supported")
    check_sizes(raw, path, [name for name in DEFAULTS if name != "axes_dims_rope"])
    if raw["patch_size"] != PATCH or raw["in_channels"] != PATCH**2 * raw["out_channels"]:
        raise CheckpointError(
            f"{path}: patch_size={raw['patch_size']}, in_channels={raw['in_channels']} and out_channels="
            f"{raw['out_channels']} do not go together; this network packs {PATCH} x {PATCH} latent pixels"
        )
    axes = rotary_axes(raw, path, "axes_dims_rope", raw["attention_head_dim"])
    return QwenImageConfig(
        depth=raw["num_layers"],
        heads=raw["num_attention_heads"],
        head_channels=raw["attention_head_dim"],
        latent_channels=raw["out_channels"],
        text_channels=raw["joint_attention_dim"],
        axes=axes,
    )
