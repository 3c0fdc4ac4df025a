"""PixArt's text-conditioned diffusion transformer, in diffusers' layout; the reference model is one."""

from models.configs.pixart import PixArtConfig, read_config
from models.pixart.components import load_denoiser
from models.pixart.network import PixArt
from models.pixart.weights import NAMES, PLAN, PRECOMPUTE

__all__ = ["NAMES", "PLAN", "PRECOMPUTE", "PixArt", "PixArtConfig", "load_denoiser", "read_config"]
