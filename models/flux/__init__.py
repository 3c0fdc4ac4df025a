"""FLUX.1's diffusion transformer, in diffusers' layout."""

from models.configs.flux import FluxConfig, read_config
from models.flux.components import load_denoiser
from models.flux.network import Flux
from models.flux.weights import NAMES, PLAN, PRECOMPUTE

__all__ = ["NAMES", "PLAN", "PRECOMPUTE", "Flux", "FluxConfig", "load_denoiser", "read_config"]
