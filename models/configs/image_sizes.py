"""The sides of images that a checkpoint generates, by its config.json files; without torch."""

from collections.abc import Mapping

from models.configs import sd3, wan
from models.registry import ARCHITECTURES


def token_side(architecture: str, denoiser: Mapping[str, object], vae: Mapping[str, object]) -> int | None:
    """Return the pixels of a token on a side, of which sizes are multiples; None if the files do not say.

    Args:
        architecture: The name of the architecture.
        denoiser: The content of the denoiser's config.json.
        vae: The content of the VAE's config.json; empty if the model has none.
    """
    if architecture == "unet":
        blocks = denoiser.get("block_out_channels")
        return 2 ** (len(blocks) - 1) if isinstance(blocks, list) else None
    known = ARCHITECTURES[architecture].patch
    patch = denoiser.get(known) if isinstance(known, str) else known
    if isinstance(patch, list) and patch:  # frames, height and width
        patch = patch[-1]
    stride = _stride(vae)
    return stride * patch if isinstance(patch, int) and stride is not None else None


def largest_side(architecture: str, denoiser: Mapping[str, object], token: int) -> int | None:
    """Return the pixels on a side at which the network's positions end; None if they do not end.

    Args:
        architecture: The name of the architecture.
        denoiser: The content of the denoiser's config.json.
        token: The pixels of a token on a side.
    """
    ends = {"sd3": ("pos_embed_max_size", sd3.DEFAULTS), "wan": ("rope_max_seq_len", wan.DEFAULTS)}
    if architecture not in ends:
        return None
    key, defaults = ends[architecture]
    positions = denoiser.get(key, defaults[key])
    return token * positions if isinstance(positions, int) else None


def _stride(vae: Mapping[str, object]) -> int | None:
    """Return the pixels of a latent pixel on a side."""
    if vae.get("_class_name") == "AutoencoderKLWan":
        stride = vae.get("scale_factor_spatial", 8)
        return stride if isinstance(stride, int) else None
    blocks, halvings = vae.get("block_out_channels"), vae.get("temperal_downsample")
    if isinstance(blocks, list):
        return 2 ** (len(blocks) - 1)
    return 2 ** len(halvings) if isinstance(halvings, list) else None
