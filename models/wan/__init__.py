"""Wan's text-to-video diffusion transformer, in diffusers' layout."""

from models.wan.components import load_denoiser
from models.wan.network import Wan, WanConfig
from models.wan.weights import NAMES, PLAN, PRECOMPUTE, read_config

__all__ = ["NAMES", "PLAN", "PRECOMPUTE", "Wan", "WanConfig", "load_denoiser", "read_config"]
