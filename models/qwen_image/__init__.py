"""Qwen-Image's double-stream diffusion transformer, in diffusers' layout, from text to a picture."""

from models.qwen_image.components import load_denoiser
from models.qwen_image.network import QwenImage, QwenImageConfig
from models.qwen_image.weights import AHEAD, NAMES, PLAN, read_config

__all__ = ["AHEAD", "NAMES", "PLAN", "QwenImage", "QwenImageConfig", "load_denoiser", "read_config"]
