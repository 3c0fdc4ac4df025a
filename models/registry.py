"""The names of all architectures, attention backends and shipped checkpoints, readable without importing torch."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from schedulers.registry import Common, Registry, Target


@dataclass(frozen=True)
class Architecture:
    """One row: how a family of checkpoints is detected and loaded.

    Args:
        module: The module whose `load(source, kernel)` builds the components.
        classes: The diffusers `_class_name`s that its denoiser's config.json may have.
        weights: The folders with tensors, besides the denoiser's.
        configs: The folders with small files only.
        optional: Those of these folders that a checkpoint may lack.
        heads: The key of its denoiser's config.json that counts attention heads; None for a UNet, which has several
            counts.
        depth: The key that counts its transformer blocks, of the first kind if there are several.
        vae: The `_class_name` of its autoencoder.
        masks: Whether its network masks keys, of text that is padded.
        patch: The latent pixels of a token on a side: a number, or a key of its denoiser's config.json. None if the
            files do not say.
        tensors: The function that checks the denoiser's config.json in a folder and returns the shapes of its tensors
            (models.configs.shapes), or None if a library builds it. It may not import torch. None = not checked.
    """

    module: str
    classes: tuple[str, ...]
    weights: tuple[str, ...]
    configs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    heads: str | None = "num_attention_heads"
    depth: str = "num_layers"
    vae: str = "AutoencoderKL"
    masks: bool = False
    patch: str | int | None = None
    tensors: Target | None = None


ARCHITECTURES: Registry[Architecture] = Registry("architecture", "model.architecture")
"""Architectures by name."""


def register_architecture(name: str, entry: Architecture, **common: Unpack[Common]) -> None:
    """Register an architecture, for model.architecture.

    Args:
        name: The architecture's name.
        entry: How its checkpoints are detected and loaded.
        **common: Options of its own, its layouts, and whether requests may share its forwards.
    """
    ARCHITECTURES.register(name, entry, **common)


register_architecture(
    "dit",
    Architecture(
        "models.dit.components",
        ("DiTTransformer2DModel", "Transformer2DModel"),
        ("vae",),
        patch="patch_size",
        tensors="models.configs.dit:expected",
    ),
)
register_architecture(
    "pixart",
    Architecture(
        "models.pixart.components",
        ("PixArtTransformer2DModel", "Transformer2DModel"),
        ("vae", "text_encoder"),
        ("tokenizer",),
        masks=True,
        patch="patch_size",
        tensors="models.configs.pixart:expected",
    ),
)
register_architecture(
    "sd3",
    Architecture(
        "models.sd3.components",
        ("SD3Transformer2DModel",),
        ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
        ("tokenizer", "tokenizer_2", "tokenizer_3"),
        optional=("text_encoder_3", "tokenizer_3"),
        patch="patch_size",
        tensors="models.configs.sd3:expected",
    ),
)
register_architecture(
    "flux",
    Architecture(
        "models.flux.components",
        ("FluxTransformer2DModel",),
        ("vae", "text_encoder", "text_encoder_2"),
        ("tokenizer", "tokenizer_2"),
        patch=2,
        tensors="models.configs.flux:expected",
    ),
)
register_architecture(
    "qwen_image",
    Architecture(
        "models.qwen_image.components",
        ("QwenImageTransformer2DModel",),
        ("vae", "text_encoder"),
        ("tokenizer",),
        vae="AutoencoderKLQwenImage",
        masks=True,
        patch=2,
        tensors="models.configs.qwen_image:expected",
    ),
)
register_architecture(
    "z_image",
    Architecture(
        "models.z_image.components",
        ("ZImageTransformer2DModel",),
        ("vae", "text_encoder"),
        ("tokenizer",),
        heads="n_heads",
        depth="n_layers",
        masks=True,
        patch=2,
        tensors="models.configs.z_image:expected",
    ),
)
register_architecture(
    "wan",
    Architecture(
        "models.wan.components",
        ("WanTransformer3DModel",),
        ("vae", "text_encoder"),
        ("tokenizer",),
        vae="AutoencoderKLWan",
        patch="patch_size",
        tensors="models.configs.wan:expected",
    ),
)
register_architecture(
    "sd",
    Architecture(
        "models.unet.sd",
        ("UNet2DConditionModel",),
        ("vae", "text_encoder"),
        ("tokenizer",),
        heads=None,
        patch=1,
        tensors="models.configs.unet:check_sd",
    ),
)
register_architecture(
    "sdxl",
    Architecture(
        "models.unet.sdxl",
        ("UNet2DConditionModel",),
        ("vae", "text_encoder", "text_encoder_2"),
        ("tokenizer", "tokenizer_2"),
        heads=None,
        patch=1,
        tensors="models.configs.unet:check_sdxl",
    ),
)
register_architecture(
    "unet",
    Architecture(
        "models.unet.unconditional", ("UNet2DModel",), (), heads=None, tensors="models.configs.unet:check_unconditional"
    ),
)


@dataclass(frozen=True)
class AttentionEntry:
    """One row: what is known of an attention backend before torch is imported.

    Args:
        backend: The Backend (models.attention.backend).
        with_lse: Whether the log-sum-exp of the scores is returned too, as a ring needs.
        masks: Whether a mask over the keys is used.
        devices: The device types with a kernel; empty if the backend decides by itself.
        dtypes: The dtypes of model.dtype with a kernel; empty for all.
        package: The package needed on every device; empty for none.
        approximate: Whether more is rounded than by the tensors' dtype.
    """

    backend: Target
    with_lse: bool = False
    masks: bool = True
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    package: str = ""
    approximate: bool = False


ATTENTION_BACKENDS: Registry[AttentionEntry] = Registry("attention backend", "attention.backend", "attention")
"""Attention backends by name, besides `auto`."""


def register_attention_backend(
    name: str,
    backend: Target,
    *,
    with_lse: bool = False,
    masks: bool = True,
    devices: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = (),
    package: str = "",
    approximate: bool = False,
    **common: Unpack[Common],
) -> None:
    """Register an attention backend, for attention.backend.

    Args:
        name: The backend's name.
        backend: The Backend (models.attention.backend), or a function of the options that returns it.
        with_lse: Whether the log-sum-exp of the scores is returned too, as a ring needs.
        masks: Whether a mask over the keys is used.
        devices: The device types with a kernel; empty if the backend decides by itself.
        dtypes: The dtypes of model.dtype with a kernel; empty for all.
        package: The package needed on every device; empty for none.
        approximate: Whether more is rounded than by the tensors' dtype.
        **common: Options of its own, its layouts, and whether requests may share its forwards.
    """
    entry = AttentionEntry(backend, with_lse, masks, devices, dtypes, package, approximate)
    ATTENTION_BACKENDS.register(name, entry, **common)


register_attention_backend("math", "models.attention.reference:MATH", with_lse=True)
register_attention_backend("sdpa", "models.attention.sdpa:SDPA")
register_attention_backend("flash", "models.attention.flash:FLASH", with_lse=True)
register_attention_backend("flex", "models.attention.flex:FLEX", with_lse=True)
register_attention_backend(
    "sage", "models.attention.sage:SAGE", with_lse=True, package="sageattention", approximate=True
)

REFERENCE = Path(__file__).parent / "reference"
PUBLISHED = Path(__file__).parent / "published"  # configurations of published checkpoints, without weights
SIZED = Path(__file__).parent / "sized"  # configurations of the same architectures at sizes that a CPU measures


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the known name closest to `name`, or an empty string if none is close."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def resolve_backend(requested: str, device_type: str = "cpu", with_lse: bool = False) -> str:
    """Return the attention backend that `requested` means on a device.

    `auto` means the backend that supports every mask, dtype and head dimension and needs no package besides PyTorch:
    `sdpa`, PyTorch's own choice. If the log-sum-exp is needed too, as in a ring, it means `flash` on the CPU and `flex`
    elsewhere.

    Raises:
        ValueError: An unknown name, with the nearest known one; or a backend whose package is not installed, with the
            line that installs it.
    """
    if requested == "auto":
        return "sdpa" if not with_lse else "flash" if device_type == "cpu" else "flex"
    if requested not in ATTENTION_BACKENDS:
        names = ", ".join(("auto", *ATTENTION_BACKENDS))
        raise ValueError(
            f"attention.backend={requested} is not a backend{did_you_mean(requested, ATTENTION_BACKENDS)}. "
            f"Choose one of: {names}"
        )
    if line := missing_package(requested):
        raise ValueError(line)
    return requested


def returns_lse(name: str) -> bool:
    """Return whether an attention backend returns the log-sum-exp of its scores."""
    return ATTENTION_BACKENDS[name].with_lse


def missing_package(backend: str) -> str:
    """Return one line about the package that an attention backend lacks on this machine, or an empty string."""
    package = ATTENTION_BACKENDS[backend].package if backend in ATTENTION_BACKENDS else ""
    if not package or importlib.util.find_spec(package) is not None:
        return ""
    return (
        f"attention={backend} needs the {package} package and a CUDA device: "
        f"pip install {package}, or use attention=sdpa"
    )
