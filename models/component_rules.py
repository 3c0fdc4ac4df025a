"""Whether the components of a checkpoint belong together, by its small files; without torch.

The launcher checks a checkpoint before a process starts, and each family's `load` checks what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from models.configs import flux, qwen_image, sd3, wan, z_image
from models.files import CheckpointError, read_json

TEXT_ENCODERS: Mapping[str, Mapping[str, str]] = {
    "pixart": {"text_encoder": "t5"},
    "sd3": {"text_encoder": "clip_text_model", "text_encoder_2": "clip_text_model", "text_encoder_3": "t5"},
    "flux": {"text_encoder": "clip_text_model", "text_encoder_2": "t5"},
    "qwen_image": {"text_encoder": "qwen2_5_vl"},
    "z_image": {"text_encoder": "qwen3"},
    "wan": {"text_encoder": "umt5"},
    "sd": {"text_encoder": "clip_text_model"},
    "sdxl": {"text_encoder": "clip_text_model", "text_encoder_2": "clip_text_model"},
}
"""The model_type of each text encoder, by architecture."""
WHOLE_MODELS = {"clip": "clip_text_model"}
"""A model_type whose config.json holds that of the text encoder as a part."""
PACKED = ("flux", "qwen_image")
"""The architectures whose network reads four latent pixels as one of four times the channels."""
DEFAULT_CHANNELS: Mapping[str, object] = {
    "sd3": sd3.DEFAULTS["in_channels"],
    "flux": flux.DEFAULTS["in_channels"],
    "qwen_image": qwen_image.DEFAULTS["in_channels"],
    "z_image": z_image.DEFAULTS["in_channels"],
    "wan": wan.DEFAULTS["in_channels"],
}
"""The channels that a network reads if its config.json does not say, by architecture."""
VAE_CHANNELS = {
    "AutoencoderKL": ("latent_channels", 4),
    "AutoencoderKLWan": ("z_dim", 16),
    "AutoencoderKLQwenImage": ("z_dim", 16),
}
"""The key of an autoencoder's latent channels and its default, by _class_name."""
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


class CheckpointFiles(Protocol):
    """Where the files of a checkpoint are."""

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""

    def config_folder(self, component: str) -> Path:
        """Return the folder with the component's config.json, or its tokenizer's files."""


def check_components(architecture: str, files: CheckpointFiles, denoiser: str) -> None:
    """Refuse components that do not belong together.

    Args:
        architecture: The name of the architecture.
        files: The checkpoint.
        denoiser: The network's folder in it.

    Raises:
        CheckpointError: One line says what does not fit, and where.
    """
    check_text_encoders(architecture, files)
    check_latent_channels(architecture, files, denoiser)
    if architecture == "wan":
        check_wan_pipeline(files)
    if architecture == "sd3":
        has_third_encoder(files)
    if architecture == "sdxl":
        check_size_numbers(files, denoiser)
    if architecture == "z_image" and files.config_folder("tokenizer").is_dir():
        check_chat_template(files.config_folder("tokenizer"))


def check_text_encoders(architecture: str, files: CheckpointFiles) -> None:
    """Refuse a text encoder of another kind than the network was trained with.

    Args:
        architecture: The name of the architecture.
        files: The checkpoint.

    Raises:
        CheckpointError: The message has the folder, and both kinds.
    """
    for name, expected in TEXT_ENCODERS.get(architecture, {}).items():
        kind = _config(files, name).get("model_type")
        if kind is not None and WHOLE_MODELS.get(str(kind), kind) != expected:
            raise CheckpointError(
                f"{files.config_folder(name)}: config.json says model_type={kind}; {name} is a {expected} here"
            )


def check_latent_channels(architecture: str, files: CheckpointFiles, denoiser: str) -> None:
    """Refuse an autoencoder of another number of latent channels than the network's.

    Args:
        architecture: The name of the architecture.
        files: The checkpoint.
        denoiser: The network's folder in it.

    Raises:
        CheckpointError: The numbers differ.
    """
    vae = _config(files, "vae")
    if vae.get("_class_name") not in VAE_CHANNELS:
        return
    key, default = VAE_CHANNELS[str(vae["_class_name"])]
    decoded = vae.get(key, default)
    channels = _config(files, denoiser).get("in_channels", DEFAULT_CHANNELS.get(architecture))
    if not isinstance(channels, int) or not isinstance(decoded, int):
        return
    each = channels // 4 if architecture in PACKED else channels
    if each != decoded:
        raise CheckpointError(
            f"{files.folder}: the network has {each} latent channels, the VAE decodes {decoded}; take both from one "
            "checkpoint"
        )


def check_wan_pipeline(files: CheckpointFiles) -> None:
    """Refuse Wan 2.2's pipelines with two networks or one timestep per token.

    Args:
        files: The checkpoint.

    Raises:
        CheckpointError: model_index.json asks for one of them.
    """
    index = _index(files)
    if index.get("boundary_ratio") is not None or index.get("expand_timesteps"):
        raise CheckpointError(
            f"{files.folder}: model_index.json asks for two networks (boundary_ratio) or one timestep per token "
            "(expand_timesteps), as Wan 2.2 has them; only Wan 2.1's text-to-video checkpoints load here"
        )


def has_third_encoder(files: CheckpointFiles) -> bool:
    """Return whether a checkpoint of Stable Diffusion 3 has T5.

    Args:
        files: The checkpoint.

    Raises:
        CheckpointError: It is named and missing.
    """
    if files.config_folder("text_encoder_3").is_dir():
        return True
    named = _index(files).get("text_encoder_3")
    if isinstance(named, list) and any(named):
        raise CheckpointError(
            f"{files.folder}: model_index.json names text_encoder_3, which is not here; copy it with tokenizer_3, or "
            'write "text_encoder_3": [null, null] there to run without T5'
        )
    return False


def check_size_numbers(files: CheckpointFiles, denoiser: str) -> None:
    """Refuse a network that takes other numbers than SDXL's six; the refiner takes aesthetic scores.

    Args:
        files: The checkpoint.
        denoiser: The network's folder in it.

    Raises:
        CheckpointError: It takes others.
    """
    network, pooled = _config(files, denoiser), _config(files, "text_encoder_2").get("projection_dim")
    expected, each = network.get("projection_class_embeddings_input_dim"), network.get("addition_time_embed_dim")
    if not isinstance(pooled, int) or not isinstance(each, int) or expected != 6 * each + pooled:
        raise CheckpointError(
            f"{files.folder}: the network takes {expected} conditioning channels, but six size numbers of {each} "
            f"channels each and a pooled vector of {pooled} are available; the refiner is not supported"
        )


def check_chat_template(tokenizer: Path) -> None:
    """Refuse a tokenizer without the template that prompts are put into.

    Args:
        tokenizer: The tokenizer's folder.

    Raises:
        CheckpointError: No file has one.
    """
    config = tokenizer / "tokenizer_config.json"
    inside = read_json(config).get("chat_template") if config.is_file() else None
    if inside is None and not any((tokenizer / name).is_file() for name in TEMPLATE_FILES):
        raise CheckpointError(f"{tokenizer}: no chat template here; copy all of the checkpoint's tokenizer files")


def _config(files: CheckpointFiles, component: str) -> dict[str, object]:
    file = files.config_folder(component) / "config.json"
    return read_json(file) if file.is_file() else {}


def _index(files: CheckpointFiles) -> dict[str, object]:
    file = files.folder / "model_index.json"
    return read_json(file) if file.is_file() else {}
