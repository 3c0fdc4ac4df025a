"""Z-Image's single-stream text-to-image diffusion transformer, in diffusers' layout."""

from models.configs.z_image import ZImageConfig, read_config
from models.z_image.components import load_denoiser
from models.z_image.network import ZImage
from models.z_image.weights import NAMES, PLAN, PRECOMPUTE

__all__ = ["NAMES", "PLAN", "PRECOMPUTE", "ZImage", "ZImageConfig", "load_denoiser", "read_config"]
