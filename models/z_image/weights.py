"""The map between the names and sizes of a checkpoint in diffusers' layout and those of the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.files import CheckpointError, check_sizes, read_network_config, rotary_axes
from models.names import NameMap
from models.plan import Dims, ParallelPlan, PrecomputePlan, Stack
from models.z_image.network import PATCH, ZImageConfig

NAMES = NameMap(  # diffusers' ZImageTransformer2DModel on the left, this network on the right
    (
        ("all_x_embedder.2-1", "image_in"),
        ("all_final_layer.2-1.adaLN_modulation.1", "head_modulation"),
        ("all_final_layer.2-1.linear", "project_out"),
        ("x_pad_token", "image_pad"),
        ("cap_pad_token", "text_pad"),
        ("t_embedder.mlp.0", "time_in"),
        ("t_embedder.mlp.2", "time_out"),
        ("cap_embedder.0", "text_norm"),
        ("cap_embedder.1", "text_in"),
        ("adaLN_modulation.0", "modulation"),
        ("to_out.0", "to_out"),
        ("feed_forward.w1", "feed_forward.gate"),
        ("feed_forward.w2", "feed_forward.down"),
        ("feed_forward.w3", "feed_forward.up"),
    )
)
TEXT_ARGUMENTS = {"x_BJD": Dims(tokens=1), "rope_2BJF": Dims(batch=1, tokens=2), "mask_BJ": Dims(tokens=1)}
ARGUMENTS = {**TEXT_ARGUMENTS, "time_BA": Dims()}
PLAN = ParallelPlan(
    heads="heads",
    stacks=(
        Stack("noise_refiner", ARGUMENTS, outputs=("x_BJD",), streams=("x_BJD",), cacheable=False),
        Stack("context_refiner", TEXT_ARGUMENTS, outputs=("x_BJD",), streams=("x_BJD",), cacheable=False),
        Stack("layers", ARGUMENTS, outputs=("x_BJD",), streams=("x_BJD",), mask="mask_BJ", signal="attention"),
    ),
    column=("*.attention.to_q", "*.attention.to_k", "*.attention.to_v", "*.feed_forward.gate", "*.feed_forward.up"),
    row=("*.attention.to_out", "*.feed_forward.down"),
)
PRECOMPUTE = PrecomputePlan(
    time_chains=(("noise_refiner.*.modulation",), ("layers.*.modulation",), ("head_modulation",)),
    time_argument="time_BA",
)
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
    if wrong := [name for name in NUMBERS if not isinstance(raw[name], int | float)]:
        raise CheckpointError(f"{path}: no number under {', '.join(wrong)}")
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
