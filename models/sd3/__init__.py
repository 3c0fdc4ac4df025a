"""The multimodal diffusion transformer of Stable Diffusion 3 and 3.5, in diffusers' layout."""

from models.configs.sd3 import SD3Config, read_config
from models.sd3.components import load_denoiser
from models.sd3.network import SD3
from models.sd3.weights import NAMES, PLAN, PRECOMPUTE

__all__ = ["NAMES", "PLAN", "PRECOMPUTE", "SD3", "SD3Config", "load_denoiser", "read_config"]
