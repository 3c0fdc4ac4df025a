"""DiT, the class-conditional diffusion transformer, in diffusers' layout."""

from models.dit.components import load_denoiser
from models.dit.network import DiT, DiTConfig
from models.dit.weights import NAMES, PLAN, PRECOMPUTE, read_config

__all__ = ["NAMES", "PLAN", "PRECOMPUTE", "DiT", "DiTConfig", "load_denoiser", "read_config"]
