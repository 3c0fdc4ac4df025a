"""The trained parts as one bfloat16 folder in diffusers' layout, for ``PixArtSigmaPipeline.from_pretrained``."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5EncoderModel

from harness.train.emoji import STYLES, Emoji
from models.dit import DiTConfig, to_diffusers
from models.dit.weights import config_json

TRANSFORMER_LIMIT = 16_000_000  # bytes of the denoiser's weights
COMPONENTS = {
    "scheduler": ("diffusers", "DPMSolverMultistepScheduler"),
    "text_encoder": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "transformer": ("diffusers", "PixArtTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def export_transformer(folder: Path, weights: dict[str, Tensor], config: DiTConfig) -> None:
    """Write ``folder/transformer``. Raises ``ValueError`` when the weights exceed ``TRANSFORMER_LIMIT``."""
    target = folder / "transformer"
    target.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in to_diffusers(weights).items()}
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    if size > TRANSFORMER_LIMIT:
        raise ValueError(
            f"the denoiser takes {size} bytes in bfloat16, more than {TRANSFORMER_LIMIT}; lower width or depth"
        )
    save_file(tensors, target / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    _write_json(target / "config.json", config_json(config))


def export_parts(folder: Path, vae: AutoencoderKL, text: Path, rows: list[Emoji]) -> None:
    """Write all but transformer and card: VAE, text encoder, tokenizer, noise schedule, index, word lists.

    text: the folder in which ``text_encoder`` and ``tokenizer`` were trained.
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
    schedule = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    schedule.save_pretrained(folder / "scheduler")
    _write_json(folder / "model_index.json", {"_class_name": "PixArtSigmaPipeline", **COMPONENTS})
    names = list(dict.fromkeys(row.name for row in rows if row.vocabulary))
    (folder / "vocabulary.txt").write_text("\n".join(sorted(names)) + "\n", encoding="utf-8")
    (folder / "styles.txt").write_text("\n".join(STYLES) + "\n", encoding="utf-8")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
