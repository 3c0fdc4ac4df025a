"""Kernels that return the log-sum-exp of their scores too, and how parts of a softmax over different keys are merged.

    out = sum_i exp(s_i) v_i / sum_i exp(s_i),    lse = log sum_i exp(s_i)

Two parts (out_a, lse_a) and (out_b, lse_b) over disjoint keys are one softmax: out = w_a out_a + w_b out_b with
w_a = exp(lse_a - lse), lse = log(exp lse_a + exp lse_b). Source: FlashAttention (Dao et al. 2022, section 3.1) and Ring
Attention (Liu et al. 2023, arXiv:2310.01889).

Shapes: B batch, L query tokens, S key tokens, H heads, D head dimension; lse is (B, L, H), float32 or better.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from models.registry import resolve_backend


class LseKernel(Protocol):
    """q_BLHD, k_BSHD, v_BSHD and a boolean key mask_BS (true = attend) to out_BLHD and lse_BLH.

    A sample none of whose keys take part gets out = 0 and lse = -inf, which a merge leaves out.
    """

    def __call__(
        self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


def math_lse(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The reference: explicit scores, softmax and log-sum-exp in float32 or better."""
    q_BHLD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    wide = torch.promote_types(q_BLHD.dtype, torch.float32)
    scores_BHLS = (q_BHLD @ k_BHSD.transpose(-1, -2) * (1.0 / math.sqrt(q_BLHD.shape[-1]))).to(wide)
    if mask_BS is not None:
        scores_BHLS = scores_BHLS.masked_fill(~mask_BS[:, None, None, :], float("-inf"))
    lse_BHL = scores_BHLS.logsumexp(dim=-1)
    weights_BHLS = (scores_BHLS - lse_BHL.clamp(min=torch.finfo(wide).min)[..., None]).exp()
    out_BHLD = weights_BHLS.to(v_BHSD.dtype) @ v_BHSD
    return out_BHLD.transpose(1, 2), lse_BHL.transpose(1, 2)


def flash_lse(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """FlashAttention: flash-attn on CUDA, PyTorch's own CPU flash kernel on the CPU.

    Raises:
        NotImplementedError: a mask on CUDA.
        ImportError: CUDA tensors without the flash-attn package.
    """
    if q_BLHD.is_cuda:
        if mask_BS is not None:
            raise NotImplementedError("attention=flash takes no key mask on CUDA; use attention=math for ring layouts")
        return _flash_attn_cuda(q_BLHD, k_BSHD, v_BSHD)
    bias_B11S, dead_B = None, None
    if mask_BS is not None:
        dead_B = ~mask_BS.any(dim=1)
        bias_B11S = torch.zeros(mask_BS.shape, dtype=q_BLHD.dtype, device=q_BLHD.device)
        bias_B11S = bias_B11S.masked_fill(~(mask_BS | dead_B[:, None]), float("-inf"))[:, None, None, :]
    out_BHLD, lse_BHL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BLHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHD.transpose(1, 2), attn_mask=bias_B11S
    )
    out_BLHD, lse_BLH = out_BHLD.transpose(1, 2), lse_BHL.transpose(1, 2)
    if dead_B is not None:
        out_BLHD = out_BLHD.masked_fill(dead_B[:, None, None, None], 0.0)
        lse_BLH = lse_BLH.masked_fill(dead_B[:, None, None], float("-inf"))
    return out_BLHD, lse_BLH


def _flash_attn_cuda(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> tuple[Tensor, Tensor]:
    try:
        from flash_attn import flash_attn_func
    except ImportError as missing:
        raise ImportError(
            "attention=flash on CUDA needs the flash-attn package: pip install 'triptych[flash]'"
        ) from missing
    out_BLHD, lse_BHL, _ = flash_attn_func(q_BLHD, k_BSHD, v_BSHD, return_attn_probs=True)
    return out_BLHD, lse_BHL.transpose(1, 2)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax from two over disjoint keys, in the dtype of the log-sum-exps (float32 or better).

    Shapes: out (B, L, H, D), lse (B, L, H).
    """
    lse = torch.logaddexp(lse_a, lse_b)
    whole = lse.clamp(min=torch.finfo(lse.dtype).min)  # -inf on both sides: no key at all, weights of 0
    w_a, w_b = (lse_a - whole).exp()[..., None], (lse_b - whole).exp()[..., None]
    return w_a * out_a.to(lse.dtype) + w_b * out_b.to(lse.dtype), lse


WITH_LSE: dict[str, LseKernel] = {"math": math_lse, "flash": flash_lse}


def lse_kernel(requested: str) -> LseKernel:
    """The kernel of a backend name that returns log-sum-exp, as ring attention needs; `auto` is flash there.

    Raises:
        ValueError: a backend that returns none, with those that do.
    """
    name = "flash" if requested == "auto" else resolve_backend(requested)
    if name not in WITH_LSE:
        raise ValueError(
            f"attention.backend={requested} returns no log-sum-exp, which ring attention merges; "
            f"use {' or '.join(WITH_LSE)}"
        )
    return WITH_LSE[name]
