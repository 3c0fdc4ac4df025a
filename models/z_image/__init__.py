"""Z-Image's single-stream diffusion transformer, in diffusers' layout, from text to a picture."""

from models.z_image.components import load_denoiser
from models.z_image.network import ZImage, ZImageConfig
from models.z_image.weights import AHEAD, NAMES, PLAN, read_config

__all__ = ["AHEAD", "NAMES", "PLAN", "ZImage", "ZImageConfig", "load_denoiser", "read_config"]
