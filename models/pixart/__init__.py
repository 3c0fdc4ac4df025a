"""PixArt's text-conditioned diffusion transformer, in diffusers' layout; the reference model is one."""

from models.pixart.components import load_denoiser
from models.pixart.network import PixArt, PixArtConfig
from models.pixart.weights import AHEAD, NAMES, PLAN, read_config

__all__ = ["AHEAD", "NAMES", "PLAN", "PixArt", "PixArtConfig", "load_denoiser", "read_config"]
