"""Merging of attention over disjoint sets of keys, from kernels that also return the log-sum-exp of their scores.

    out = sum_i exp(s_i) v_i / sum_i exp(s_i),    lse = log sum_i exp(s_i)

Two results (out_a, lse_a) and (out_b, lse_b) over disjoint keys are one softmax: out = w_a out_a + w_b out_b with w_a =
exp(lse_a - lse), lse = log(exp lse_a + exp lse_b). Source: FlashAttention (Dao et al. 2022, section 3.1) and Ring
Attention (Liu et al. 2023, arXiv:2310.01889).
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.attention.backend import LseKernel
from models.attention.reference import math_lse
from models.attention.table import WITH_LSE, lse_kernel

__all__ = ["WITH_LSE", "LseKernel", "lse_kernel", "math_lse", "merge"]


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return out and lse of one softmax, merged from two over disjoint keys.

    The result has the dtype of the log-sum-exps (float32 or better). Shapes: out (B, L, H, D), lse (B, L, H).
    """
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.clamp(min=torch.finfo(lse.dtype).min)  # both are -inf if there is no key at all: weights of 0
    w_a, w_b = (lse_a - finite).exp()[..., None], (lse_b - finite).exp()[..., None]
    return w_a * out_a.to(lse.dtype) + w_b * out_b.to(lse.dtype), lse
