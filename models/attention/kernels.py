"""Which kernels compute softmax(q k^T / sqrt(D)) v, and which of them runs on which device.

Shapes: B batch, L query tokens, S key tokens, H heads, D head dimension. Every kernel maps q_BLHD, k_BSHD, v_BSHD to
out_BLHD; `mask_BS` is boolean and true where a key takes part. A kernel that cannot honour a mask refuses it, it never
drops it.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from models.registry import resolve_backend


class AttentionKernel(Protocol):
    """One attention computation: q_BLHD, k_BSHD, v_BSHD and a boolean key mask_BS (true = attend) to out_BLHD."""

    def __call__(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor: ...


def math_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """The reference: explicit scores, softmax in float32 or better (Vaswani et al. 2017, eq. 1)."""
    q_BHLD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    scores_BHLS = q_BHLD @ k_BHSD.transpose(-1, -2) * (1.0 / math.sqrt(q_BLHD.shape[-1]))
    if mask_BS is not None:
        scores_BHLS = scores_BHLS.masked_fill(~mask_BS[:, None, None, :], float("-inf"))
    wide = torch.promote_types(scores_BHLS.dtype, torch.float32)
    weights_BHLS = scores_BHLS.softmax(dim=-1, dtype=wide).to(v_BHSD.dtype)
    return (weights_BHLS @ v_BHSD).transpose(1, 2)


def sdpa_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`: PyTorch picks among its own fused kernels."""
    mask_BHLS = None if mask_BS is None else mask_BS[:, None, None, :]
    out_BHLD = F.scaled_dot_product_attention(
        q_BLHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHD.transpose(1, 2), attn_mask=mask_BHLS
    )
    return out_BHLD.transpose(1, 2)


def flash_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """FlashAttention (Dao 2023): the flash-attn package on CUDA, PyTorch's own CPU flash kernel on the CPU.

    The CPU kernel takes the key mask as an additive bias; flash-attn on CUDA takes none, so a masked call is refused
    there.

    Raises:
        NotImplementedError: a mask on CUDA, where the package has no argument for it.
        ImportError: CUDA tensors without the flash-attn package.
    """
    if q_BLHD.is_cuda:
        if mask_BS is not None:
            raise NotImplementedError("attention=flash takes no key mask on CUDA; use attention=sdpa for padded text")
        return _flash_attn_cuda(q_BLHD, k_BSHD, v_BSHD)
    bias_B11S = None
    if mask_BS is not None:
        bias_B11S = torch.zeros(mask_BS.shape, dtype=q_BLHD.dtype, device=q_BLHD.device)
        bias_B11S = bias_B11S.masked_fill(~mask_BS, float("-inf"))[:, None, None, :]
    out_BHLD, _log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BLHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHD.transpose(1, 2), attn_mask=bias_B11S
    )
    return out_BHLD.transpose(1, 2)


def _flash_attn_cuda(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    try:
        from flash_attn import flash_attn_func
    except ImportError as missing:
        raise ImportError(
            "attention=flash on CUDA needs the flash-attn package: pip install 'triptych[flash]'"
        ) from missing
    out_BLHD: Tensor = flash_attn_func(q_BLHD, k_BSHD, v_BSHD)
    return out_BLHD


BACKENDS: dict[str, AttentionKernel] = {"math": math_attention, "sdpa": sdpa_attention, "flash": flash_attention}


def attention_kernel(requested: str) -> AttentionKernel:
    """The kernel of a backend name, `auto` included.

    Raises:
        ValueError: an unknown name.
    """
    return BACKENDS[resolve_backend(requested)]
