"""Stable Diffusion 3 and 3.5's multimodal diffusion transformer, in diffusers' layout."""

from models.sd3.components import load_denoiser
from models.sd3.network import SD3, SD3Config
from models.sd3.weights import AHEAD, NAMES, PLAN, read_config

__all__ = ["AHEAD", "NAMES", "PLAN", "SD3", "SD3Config", "load_denoiser", "read_config"]
