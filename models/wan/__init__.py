"""Wan's text-to-video diffusion transformer, in diffusers' layout."""

from models.wan.components import load_denoiser
from models.wan.network import Wan, WanConfig
from models.wan.weights import AHEAD, NAMES, PLAN, read_config

__all__ = ["AHEAD", "NAMES", "PLAN", "Wan", "WanConfig", "load_denoiser", "read_config"]
