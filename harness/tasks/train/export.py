"""The trained parts as one bfloat16 folder in diffusers' layout, for ``PixArtSigmaPipeline.from_pretrained``.

VAE, text encoder and tokenizer are there once. Each family has its own denoiser and noise scheduler, named
``transformer/`` and ``scheduler/`` for rectified flow, and with the suffix ``_<family>`` for the others.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    SchedulerMixin,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5EncoderModel

from harness.metrics.gallery import FILE, Gallery
from harness.resolve.training import DIFFUSERS_PREDICTIONS, check_export
from harness.tasks.train.folder import CaptionedImage
from models.configs.pixart import config_json
from models.pixart import NAMES, PixArtConfig
from schedulers.settings import NoiseSchedulerSettings

TRANSFORMER_LIMIT = 16_000_000  # largest size of the denoiser's weights, bytes
COMPONENTS = {
    "scheduler": ("diffusers", "DPMSolverMultistepScheduler"),
    "text_encoder": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "transformer": ("diffusers", "PixArtTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
SHARED = ("vae", "text_encoder", "tokenizer")  # parts that every family's denoiser uses
UNSUFFIXED_FAMILY = "rectified_flow"  # its components have diffusers' plain names


def component(name: str, family: str) -> str:
    """Return the folder name of a family's ``transformer`` or ``scheduler``."""
    return name if family == UNSUFFIXED_FAMILY else f"{name}_{family}"


def export_transformer(folder: Path, weights: dict[str, Tensor], config: PixArtConfig, family: str) -> None:
    """Write the family's denoiser in bfloat16.

    Args:
        folder: Folder of the exported model.
        weights: Averaged weights by the network's own names.
        config: Sizes of the network.
        family: Name of the family.

    Raises:
        ValueError: The weights exceed ``TRANSFORMER_LIMIT``.
    """
    target = folder / component("transformer", family)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {NAMES.to_published(name): value.to(torch.bfloat16).contiguous() for name, value in weights.items()}
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    if size > TRANSFORMER_LIMIT:
        raise ValueError(
            f"the denoiser takes {size} bytes in bfloat16, more than {TRANSFORMER_LIMIT}; lower width or depth"
        )
    save_file(tensors, target / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    _write_json(target / "config.json", config_json(config))


def export_noise_scheduler(folder: Path, settings: NoiseSchedulerSettings) -> None:
    """Write the family's noise scheduler in diffusers' vocabulary.

    Args:
        folder: Folder of the exported model.
        settings: Resolved settings of the noise scheduler.

    Raises:
        ValueError: diffusers has no name for the settings.
    """
    target = folder / component("scheduler", settings.family)
    to_diffusers(settings).save_pretrained(target)


def to_diffusers(settings: NoiseSchedulerSettings) -> SchedulerMixin:
    """Build diffusers' noise scheduler for resolved settings.

    Args:
        settings: Resolved settings of the noise scheduler.

    Returns:
        diffusers' scheduler.

    Raises:
        ValueError: diffusers has no name for the settings.
    """
    s = settings
    check_export(s)
    prediction = DIFFUSERS_PREDICTIONS[s.path or "", s.prediction or ""]
    if s.family == "rectified_flow":
        return DPMSolverMultistepScheduler(prediction_type=prediction, use_flow_sigmas=True, flow_shift=1.0)
    if s.family == "sgm":
        return EDMEulerScheduler(
            sigma_min=0.002 if s.sigma_min is None else s.sigma_min,
            sigma_max=80.0 if s.sigma_max is None else s.sigma_max,
            sigma_data=0.5 if s.sigma_data is None else s.sigma_data,
            prediction_type=prediction,
            rho=7.0 if s.rho is None else s.rho,
        )
    return DDIMScheduler(
        num_train_timesteps=s.train_steps or 1000,
        beta_start=1e-4 if s.beta_start is None else s.beta_start,
        beta_end=0.02 if s.beta_end is None else s.beta_end,
        beta_schedule={"squaredcos": "squaredcos_cap_v2"}.get(s.beta_schedule or "", s.beta_schedule or "linear"),
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=s.end != "t_min",
        steps_offset=s.steps_offset or 0,
        timestep_spacing=s.spacing,
    )


def export_parts(folder: Path, vae: AutoencoderKL, text: Path, rows: list[CaptionedImage]) -> None:
    """Write the parts that families share: VAE, text encoder, tokenizer, index and word lists.

    Args:
        folder: Folder of the exported model, created if missing.
        vae: Trained autoencoder.
        text: Folder in which ``text_encoder`` and ``tokenizer`` were trained.
        rows: All images of the data set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy = AutoencoderKL.from_config(vae.config)
    copy.load_state_dict(vae.state_dict())
    copy.bfloat16().save_pretrained(folder / "vae")
    encoder = T5EncoderModel.from_pretrained(text / "text_encoder", dtype=torch.bfloat16)
    encoder.save_pretrained(folder / "text_encoder")
    shutil.copytree(text / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    settings = folder / "tokenizer" / "tokenizer_config.json"
    _write_json(settings, {**json.loads(settings.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"})
    _write_lists(folder, rows)


def copy_parts(folder: Path, shared: Path, rows: list[CaptionedImage]) -> None:
    """Copy the shared parts from an exported model, byte for byte.

    Args:
        folder: Folder of the exported model; if it is ``shared`` itself, nothing is done.
        shared: Folder of an earlier exported model.
        rows: All images of the data set.
    """
    if folder.resolve() == shared.resolve():
        return
    for name in SHARED:
        shutil.copytree(shared / name, folder / name, dirs_exist_ok=True)
    _write_lists(folder, rows)


def _write_lists(folder: Path, rows: list[CaptionedImage]) -> None:
    _write_json(folder / "model_index.json", {"_class_name": "PixArtSigmaPipeline", **COMPONENTS})
    names = dict.fromkeys(row.name for row in rows if row.vocabulary)
    styles = dict.fromkeys(row.style for row in rows if row.vocabulary and row.style)
    for file_name, words in (("vocabulary.txt", sorted(names)), ("styles.txt", list(styles))):
        (folder / file_name).write_text("".join(f"{word}\n" for word in words), encoding="utf-8")


def export_gallery(folder: Path, pixels: np.ndarray, rows: list[CaptionedImage]) -> None:
    """Write ``gallery.safetensors`` from the denoiser's training images.

    Args:
        folder: Folder of the exported model, created if missing.
        pixels: Training images, uint8 (N, H, W, 3).
        rows: Their rows of the data set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    Gallery.build(pixels, [row.name for row in rows], [row.style for row in rows]).save(folder / FILE)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
