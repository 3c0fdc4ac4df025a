"""UNets of Stable Diffusion, SDXL, DDPM and NCSN++: diffusers' own classes with this package's attention."""

from models.unet.attention import KernelAttention, route_attention
from models.unet.network import PLAN, ConditionalUNet, SizeConditionedUNet, UnconditionalUNet

__all__ = ["PLAN", "ConditionalUNet", "KernelAttention", "SizeConditionedUNet", "UnconditionalUNet", "route_attention"]
