"""DiT, the class-conditional diffusion transformer, in diffusers' layout."""

from models.dit.components import load_denoiser
from models.dit.network import DiT, DiTConfig
from models.dit.weights import AHEAD, NAMES, PLAN, read_config

__all__ = ["AHEAD", "NAMES", "PLAN", "DiT", "DiTConfig", "load_denoiser", "read_config"]
