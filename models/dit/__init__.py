"""DiT, the class-conditional diffusion transformer, in diffusers' layout."""

from models.configs.dit import DiTConfig, read_config
from models.dit.components import load_denoiser
from models.dit.network import DiT
from models.dit.weights import NAMES, PLAN, PRECOMPUTE

__all__ = ["NAMES", "PLAN", "PRECOMPUTE", "DiT", "DiTConfig", "load_denoiser", "read_config"]
