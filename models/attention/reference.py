"""`math`: attention in explicit form, the reference for the tests of the other backends.

All scores of queries and keys are in memory at once. Source: Vaswani et al. 2017, eq. 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.attention.backend import Backend, unmask_empty_samples, zero_empty_samples


def math_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """Compute explicit scores, with the softmax in float32 or better."""
    q_BHLD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    scores_BHLS = q_BHLD @ k_BHSD.transpose(-1, -2) * (1.0 / math.sqrt(q_BLHD.shape[-1]))
    empty_B = None
    if mask_BS is not None:
        mask_BS, empty_B = unmask_empty_samples(mask_BS)
        scores_BHLS = scores_BHLS.masked_fill(~mask_BS[:, None, None, :], float("-inf"))
    dtype = torch.promote_types(scores_BHLS.dtype, torch.float32)
    weights_BHLS = scores_BHLS.softmax(dim=-1, dtype=dtype).to(v_BHSD.dtype)
    out_BLHD = (weights_BHLS @ v_BHSD).transpose(1, 2)
    return out_BLHD if empty_B is None else out_BLHD.masked_fill(empty_B[:, None, None, None], 0.0)


def math_lse(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute explicit scores, with the softmax and log-sum-exp in float32 or better."""
    q_BHLD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    dtype = torch.promote_types(q_BLHD.dtype, torch.float32)
    scores_BHLS = (q_BHLD @ k_BHSD.transpose(-1, -2) * (1.0 / math.sqrt(q_BLHD.shape[-1]))).to(dtype)
    empty_B = None
    if mask_BS is not None:
        mask_BS, empty_B = unmask_empty_samples(mask_BS)
        scores_BHLS = scores_BHLS.masked_fill(~mask_BS[:, None, None, :], float("-inf"))
    lse_BHL = scores_BHLS.logsumexp(dim=-1)
    weights_BHLS = (scores_BHLS - lse_BHL[..., None]).exp().to(v_BHSD.dtype)
    out_BLHD, lse_BLH = (weights_BHLS @ v_BHSD).transpose(1, 2), lse_BHL.transpose(1, 2)
    return (out_BLHD, lse_BLH) if empty_B is None else zero_empty_samples(out_BLHD, lse_BLH, empty_B)


def _kernel_name(device_type: str, with_lse: bool) -> str:
    return "math"


MATH = Backend(math_attention, math_lse, _kernel_name)
