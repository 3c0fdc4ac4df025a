"""Qwen-Image's double-stream text-to-image diffusion transformer, in diffusers' layout."""

from models.configs.qwen_image import QwenImageConfig, read_config
from models.qwen_image.components import load_denoiser
from models.qwen_image.network import QwenImage
from models.qwen_image.weights import NAMES, PLAN, PRECOMPUTE

__all__ = ["NAMES", "PLAN", "PRECOMPUTE", "QwenImage", "QwenImageConfig", "load_denoiser", "read_config"]
