"""FLUX.1's diffusion transformer, in diffusers' layout."""

from models.flux.components import load_denoiser
from models.flux.network import Flux, FluxConfig
from models.flux.weights import NAMES, PLAN, PRECOMPUTE, read_config

__all__ = ["NAMES", "PLAN", "PRECOMPUTE", "Flux", "FluxConfig", "load_denoiser", "read_config"]
