"""The text-conditioned diffusion transformer of the reference model, in PixArt's convention and diffusers' layout."""

from models.dit.network import DiT, DiTConfig
from models.dit.weights import from_diffusers, load_dit, read_config, to_diffusers

__all__ = ["DiT", "DiTConfig", "from_diffusers", "load_dit", "read_config", "to_diffusers"]
