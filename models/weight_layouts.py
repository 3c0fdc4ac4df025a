"""Layouts of weights that are not diffusers': known by their names, and refused with what to do about them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from models.files import CheckpointError

WHOLE_MODEL = "model.diffusion_model."
WRAPPERS = ("transformer.", "module.", "_orig_mod.", "net.", "model.", "unet.", "vae.")
SINGLE_FILE_CLASSES = (  # those with from_single_file in diffusers 0.42
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
    "QwenImageTransformer2DModel",
    "ZImageTransformer2DModel",
    "UNet2DConditionModel",
    "AutoencoderKL",
    "AutoencoderKLWan",
)
MARKERS = {  # the beginning of a name that a publisher's own layout has, by class
    "FluxTransformer2DModel": (("double_blocks.", "the layout of Black Forest Labs"),),
    "SD3Transformer2DModel": (("joint_blocks.", "the layout of Stability AI"),),
    "WanTransformer3DModel": (("blocks.0.self_attn.", "the layout of Wan's own code"),),
    "ZImageTransformer2DModel": (("layers.0.attention.qkv.", "the layout of Z-Image's own code"),),
    "PixArtTransformer2DModel": (("blocks.0.attn.qkv.", "the layout of PixArt's own code"),),
    "DiTTransformer2DModel": (("blocks.0.attn.qkv.", "the layout of DiT's own code"),),
    "Transformer2DModel": (("blocks.0.attn.qkv.", "the publisher's own layout"),),
    "UNet2DConditionModel": (("input_blocks.", "the layout of latent diffusion (LDM)"),),
    "AutoencoderKL": (
        ("decoder.up.", "the layout of latent diffusion (LDM)"),
        ("first_stage_model.", "the layout of latent diffusion (LDM)"),
    ),
    "AutoencoderKLWan": (("decoder.upsamples.", "the layout of Wan's own code"),),
    "AutoencoderKLQwenImage": (("decoder.upsamples.", "the layout of Wan's own code"),),
}
TEXT_ENCODER_MARKERS = (
    ("transformer.resblocks.", "the layout of OpenCLIP"),
    ("cond_stage_model.", "the layout of latent diffusion (LDM)"),
    ("conditioner.embedders.", "the layout of latent diffusion (SGM)"),
)


def check_layout_of_weights(names: Iterable[str], class_name: str | None, weights: Path) -> None:
    """Raise an error for weights in another layout than that of diffusers and transformers.

    Args:
        names: The names of the tensors.
        class_name: The component's class in its config.json; None if it has none, as text encoders do not.
        weights: The folder or file of the weights.

    Raises:
        CheckpointError: Which layout it is, and how to convert it.
    """
    there = sorted(names)
    if found := next((name for name in there if name.startswith(WHOLE_MODEL)), None):
        others = sum(not name.startswith(WHOLE_MODEL) for name in there)
        also = f", beside {others} tensors of other components" if others else ""
        raise CheckpointError(
            f"{weights}: a whole model in one file, with {WHOLE_MODEL} in front of names ({found}){also}; "
            f"{_advice(class_name)}"
        )
    markers = MARKERS.get(class_name or "", TEXT_ENCODER_MARKERS)
    for start, layout in markers:
        if found := next((name for name in there if name.startswith(start)), None):
            raise CheckpointError(f"{weights}: {layout} ({found}), not that of diffusers; {_advice(class_name)}")
    wrapper = next((start for start in WRAPPERS if there and all(name.startswith(start) for name in there)), None)
    if wrapper is not None and class_name in MARKERS:
        raise CheckpointError(
            f"{weights}: every name has {wrapper} in front ({there[0]}), of a wrapper; save the network without it"
        )


def _advice(class_name: str | None) -> str:
    if class_name in SINGLE_FILE_CLASSES:
        return f"convert it once: diffusers.{class_name}.from_single_file(FILE).save_pretrained(DIR), and give DIR"
    return "give the checkpoint in diffusers' layout; diffusers/scripts has conversions"
