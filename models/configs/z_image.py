"""The sizes of Z-Image's network, read from its config.json, and the tensors it needs; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.configs.shapes import TensorShapes
from models.files import CheckpointError, check_lists, check_numbers, check_sizes, read_network_config, rotary_axes

PATCH = 2  # a token is PATCH x PATCH latent pixels
TIME_CHANNELS = 256
TIME_HIDDEN = 1024
CLASS_NAME = "ZImageTransformer2DModel"
DEFAULTS: dict[str, Any] = {  # diffusers' defaults of the keys that a config.json omits
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "siglip_feat_dim": None,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": (32, 48, 48),
}
COUNTS = ("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "cap_feat_dim")
NUMBERS = ("norm_eps", "rope_theta", "t_scale")


@dataclass(frozen=True)
class ZImageConfig:
    """The sizes of one network.

    Args:
        depth: The number of blocks over image and text together.
        refiner_depth: The number of blocks over each of them alone, before.
        heads: The number of attention heads; the width is heads * head_channels.
        head_channels: The number of channels per head.
        latent_channels: The number of latent channels, C.
        text_channels: The number of channels of a prompt embedding.
        axes: The channels of a head that text position, row and column rotate; they add up to head_channels.
        theta: The base of the rotary rates.
        time_scale: The factor of the network's time input, time_scale * (1 - sigma).
        norm_eps: The epsilon of the norms around attention and feed-forward, and of the text's norm.
        qk_norm: Whether queries and keys have RMS norms.
    """

    depth: int = 30
    refiner_depth: int = 2
    heads: int = 30
    head_channels: int = 128
    latent_channels: int = 16
    text_channels: int = 2560
    axes: tuple[int, int, int] = (32, 48, 48)
    theta: float = 256.0
    time_scale: float = 1000.0
    norm_eps: float = 1e-5
    qk_norm: bool = True

    @property
    def width(self) -> int:
        """The number of channels of a token."""
        return self.heads * self.head_channels

    @property
    def hidden(self) -> int:
        """The number of channels inside a feed-forward."""
        return int(self.width / 3 * 8)

    @property
    def time_width(self) -> int:
        """The number of channels of the time embedding, A."""
        return min(self.width, TIME_CHANNELS)


def read_config(folder: Path) -> ZImageConfig:
    """Read the sizes from a `config.json` of diffusers' `ZImageTransformer2DModel`.

    `axes_lens`, the lengths of diffusers' position tables, has no counterpart: positions are computed on demand.

    Args:
        folder: The network's folder.

    Returns:
        The sizes.

    Raises:
        CheckpointError: No such file, another class, or an option that this network does not support.
    """
    path, raw = folder / "config.json", read_network_config(folder, (CLASS_NAME,), DEFAULTS)
    if raw["siglip_feat_dim"] is not None:
        raise CheckpointError(f"{path}: siglip_feat_dim (images as conditions, in Z-Image-Omni) is not supported")
    check_sizes(raw, path, COUNTS, least=0)
    check_sizes(raw, path, ("dim", "n_heads"))
    check_numbers(raw, path, NUMBERS)
    check_lists(raw, path, ("all_patch_size", "all_f_patch_size"))
    patches = list(raw["all_patch_size"]), list(raw["all_f_patch_size"])
    if patches != ([PATCH], [1]):
        raise CheckpointError(
            f"{path}: all_patch_size={patches[0]} and all_f_patch_size={patches[1]}; this network has [{PATCH}] and [1]"
        )
    if raw["n_kv_heads"] != raw["n_heads"]:
        raise CheckpointError(f"{path}: n_kv_heads={raw['n_kv_heads']} is not n_heads={raw['n_heads']}")
    axes = rotary_axes(raw, path, "axes_dims", raw["dim"] // raw["n_heads"])
    return ZImageConfig(
        depth=raw["n_layers"],
        refiner_depth=raw["n_refiner_layers"],
        heads=raw["n_heads"],
        head_channels=sum(axes),
        latent_channels=raw["in_channels"],
        text_channels=raw["cap_feat_dim"],
        axes=axes,
        theta=float(raw["rope_theta"]),
        time_scale=float(raw["t_scale"]),
        norm_eps=float(raw["norm_eps"]),
        qk_norm=bool(raw["qk_norm"]),
    )


def tensor_shapes(config: ZImageConfig) -> TensorShapes:
    """Return the shape of every tensor of the network, by published name."""
    found, width = TensorShapes(), config.width
    found.linear("all_x_embedder.2-1", PATCH**2 * config.latent_channels, width)
    found["x_pad_token"] = found["cap_pad_token"] = (1, width)
    found.linear("t_embedder.mlp.0", TIME_CHANNELS, TIME_HIDDEN)
    found.linear("t_embedder.mlp.2", TIME_HIDDEN, config.time_width)
    found.gains(("cap_embedder.0",), config.text_channels)
    found.linear("cap_embedder.1", config.text_channels, width)
    stacks = {"noise_refiner": config.refiner_depth, "context_refiner": config.refiner_depth, "layers": config.depth}
    for stack, block in ((stack, f"{stack}.{n}") for stack, depth in stacks.items() for n in range(depth)):
        found.attention(f"{block}.attention", width, bias=False)
        if config.qk_norm:
            found.gains((f"{block}.attention.norm_q", f"{block}.attention.norm_k"), config.head_channels)
        found.linear(f"{block}.feed_forward.w1", width, config.hidden, bias=False)
        found.linear(f"{block}.feed_forward.w2", config.hidden, width, bias=False)
        found.linear(f"{block}.feed_forward.w3", width, config.hidden, bias=False)
        found.gains((f"{block}.{part}_norm{n}" for part in ("attention", "ffn") for n in (1, 2)), width)
        if stack != "context_refiner":
            found.linear(f"{block}.adaLN_modulation.0", config.time_width, 4 * width)
    found.linear("all_final_layer.2-1.adaLN_modulation.1", config.time_width, width)
    found.linear("all_final_layer.2-1.linear", width, PATCH**2 * config.latent_channels)
    return found


def expected(folder: Path) -> TensorShapes:
    """Check the denoiser's config.json in a folder, and return the shapes of its tensors. Raises CheckpointError."""
    return tensor_shapes(read_config(folder))
