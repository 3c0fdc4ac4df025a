"""Attention behind one function: `kernel(q, k, v, mask)` on (B, L, H, D), with the backend chosen by name."""

from models.attention.backend import AttentionKernel, Backend, LseKernel
from models.attention.reference import math_attention
from models.attention.sdpa import sdpa_attention
from models.attention.table import BACKENDS, attention_kernel, backend, lse_kernel, resolved_name

__all__ = [
    "BACKENDS",
    "AttentionKernel",
    "Backend",
    "LseKernel",
    "attention_kernel",
    "backend",
    "lse_kernel",
    "math_attention",
    "resolved_name",
    "sdpa_attention",
]
