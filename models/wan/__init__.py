"""Wan's text-to-video diffusion transformer, in diffusers' layout."""

from models.configs.wan import WanConfig, read_config
from models.wan.components import load_denoiser
from models.wan.network import Wan
from models.wan.weights import NAMES, PLAN, PRECOMPUTE

__all__ = ["NAMES", "PLAN", "PRECOMPUTE", "Wan", "WanConfig", "load_denoiser", "read_config"]
