"""FLUX.1's diffusion transformer, in diffusers' layout."""

from models.flux.components import load_denoiser
from models.flux.network import Flux, FluxConfig
from models.flux.weights import AHEAD, NAMES, PLAN, read_config

__all__ = ["AHEAD", "NAMES", "PLAN", "Flux", "FluxConfig", "load_denoiser", "read_config"]
