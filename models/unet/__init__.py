"""UNets of Stable Diffusion, SDXL, DDPM and NCSN++: diffusers' own classes, with this package's attention in them."""

from models.unet.attention import KernelAttention, route_attention
from models.unet.network import PLAN, ConditionalUNet, SizedUNet, UnconditionalUNet

__all__ = ["PLAN", "ConditionalUNet", "KernelAttention", "SizedUNet", "UnconditionalUNet", "route_attention"]
