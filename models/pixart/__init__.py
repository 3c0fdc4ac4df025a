"""PixArt's text-conditioned diffusion transformer, in diffusers' layout; the reference model is one."""

from models.pixart.components import load_denoiser
from models.pixart.network import PixArt, PixArtConfig
from models.pixart.weights import NAMES, PLAN, PRECOMPUTE, read_config

__all__ = ["NAMES", "PLAN", "PRECOMPUTE", "PixArt", "PixArtConfig", "load_denoiser", "read_config"]
