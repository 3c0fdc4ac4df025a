"""A tiny whole checkpoint of every family: how diffusers writes it to a folder, and what a run of it is told."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.models import (
    test_dit_pipeline,
    test_flux_pipeline,
    test_pixart_pipeline,
    test_qwen_image_pipeline,
    test_sd3_pipeline,
    test_unet_pipeline,
    test_z_image_pipeline,
)
from tests.models.wan_checkpoint import tiny_wan

SHORT = ("model.text.tokens=20",)
PATCHES = ("model.size_multiple=4",)
SIZE = {"height": 48, "width": 32}
PROMPTS = ["a red fox", "two small boats"]


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint, and what a run of it is told.

    Args:
        model: the option of group model.
        save: writes the checkpoint to a folder; a transformer's also takes `heads`, its number of attention heads.
        overrides: beside the folder and float32.
        asked: of every request.
        evaluations: of the network, for 3 steps.
    """

    model: str
    save: Callable[..., object]
    overrides: tuple[str, ...]
    asked: dict[str, Any]
    evaluations: int = 3


def save_wan(folder: Path, heads: int = 2) -> None:
    """Wan's, whose pipeline its own tests want too."""
    tiny_wan(heads).save_pretrained(folder)


def save_sd(folder: Path, name: str) -> None:
    """A Stable Diffusion of either generation."""
    test_unet_pipeline.sd(name).save_pretrained(folder)


CASES = {
    "dit": Case(
        "dit_256",
        test_dit_pipeline.save,
        (*PATCHES, "model.height=16", "model.width=16", "model.examples=[cock]"),
        {"prompts": ["cock", "999"], "height": 16, "width": 16, "negative_prompt": ""},
    ),
    "pixart_alpha": Case(
        "pixart_alpha", partial(test_pixart_pipeline.save, name="pixart_alpha"), (*PATCHES, *SHORT), SIZE
    ),
    "pixart_sigma": Case(
        "pixart_sigma", partial(test_pixart_pipeline.save, name="pixart_sigma"), (*PATCHES, *SHORT), SIZE
    ),
    "sd3": Case("sd3", partial(test_sd3_pipeline.checkpoint, medium=False), (*PATCHES, *SHORT), SIZE),
    "sd35_medium": Case("sd35_medium", partial(test_sd3_pipeline.checkpoint, medium=True), (*PATCHES, *SHORT), SIZE),
    "flux": Case("flux", partial(test_flux_pipeline.checkpoint, distilled=True), (*PATCHES, *SHORT), SIZE),
    "flux_schnell": Case(
        "flux_schnell", partial(test_flux_pipeline.checkpoint, distilled=False), (*PATCHES, *SHORT), SIZE
    ),
    "qwen_image": Case(
        "qwen_image",
        test_qwen_image_pipeline.save,
        (
            "model.size_multiple=8",
            "model.text.tokens=40",
        ),
        SIZE,
    ),
    "z_image": Case(
        "z_image_turbo",
        test_z_image_pipeline.save,
        (
            *PATCHES,
            "model.text.tokens=48",
        ),
        SIZE,
    ),
    "wan": Case(
        "wan_1_3b",
        save_wan,
        (
            "model.size_multiple=8",
            "model.text.tokens=24",
        ),
        {"height": 32, "width": 16, "frames": 5},
    ),
    "sd15": Case("sd15", partial(save_sd, name="sd15"), (), SIZE, evaluations=4),
    "sd21": Case("sd21", partial(save_sd, name="sd21"), (), SIZE),
    "sdxl": Case("sdxl", lambda folder: test_unet_pipeline.sdxl().save_pretrained(folder), (), SIZE),
}


def overrides_of(case: Case, folder: Path) -> list[str]:
    """A run of the checkpoint in this folder, in float32."""
    return [f"model={case.model}", f"model.path={folder}", "model.dtype=float32", *case.overrides]
