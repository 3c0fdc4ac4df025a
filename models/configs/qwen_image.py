"""The sizes of Qwen-Image's network, read from its config.json, and the tensors it needs; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.configs.shapes import TensorShapes
from models.files import CheckpointError, check_sizes, read_network_config, rotary_axes

TIME_CHANNELS = 256
PATCH = 2  # a token is PATCH x PATCH latent pixels
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


@dataclass(frozen=True)
class QwenImageConfig:
    """The sizes of one network.

    Args:
        depth: The number of blocks.
        heads: The number of attention heads; the width is heads * head_channels.
        head_channels: The number of channels per head.
        latent_channels: The number of latent channels, C.
        text_channels: The number of channels of a prompt embedding.
        axes: The channels of a head that frame, row and column rotate; they add up to head_channels.
    """

    depth: int = 60
    heads: int = 24
    head_channels: int = 128
    latent_channels: int = 16
    text_channels: int = 3584
    axes: tuple[int, int, int] = (16, 56, 56)

    @property
    def width(self) -> int:
        """The number of channels of a token."""
        return self.heads * self.head_channels


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


def tensor_shapes(config: QwenImageConfig) -> TensorShapes:
    """Return the shape of every tensor of the network, by published name."""
    found, width = TensorShapes(), config.width
    found.embedder("time_text_embed.timestep_embedder", TIME_CHANNELS, width)
    found.gains(("txt_norm",), config.text_channels)
    found.linear("txt_in", config.text_channels, width)
    found.linear("img_in", PATCH**2 * config.latent_channels, width)
    for block in (f"transformer_blocks.{n}" for n in range(config.depth)):
        found.linear(f"{block}.img_mod.1", width, 6 * width)
        found.linear(f"{block}.txt_mod.1", width, 6 * width)
        found.joint_attention(f"{block}.attn", width, config.head_channels)
        found.feed_forward(f"{block}.img_mlp", width)
        found.feed_forward(f"{block}.txt_mlp", width)
    found.linear("norm_out.linear", width, 2 * width)
    found.linear("proj_out", width, PATCH**2 * config.latent_channels)
    return found


def expected(folder: Path) -> TensorShapes:
    """Check the denoiser's config.json in a folder, and return the shapes of its tensors. Raises CheckpointError."""
    return tensor_shapes(read_config(folder))
