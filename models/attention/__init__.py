"""Attention behind one function: `kernel(q, k, v)` on (B, L, H, D), with the backend chosen by name and said aloud."""

from models.attention.kernels import (
    BACKENDS,
    AttentionKernel,
    attention_kernel,
    flash_attention,
    math_attention,
    sdpa_attention,
)

__all__ = [
    "BACKENDS",
    "AttentionKernel",
    "attention_kernel",
    "flash_attention",
    "math_attention",
    "sdpa_attention",
]
