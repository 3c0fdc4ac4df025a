"""`sdpa`: PyTorch's own function, which picks among its fused kernels by device, dtype and shape."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from models.attention.backend import Backend


def sdpa_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`; a sample without keys is 0, where cuDNN's kernel makes it the
    mean of its values.
    """
    mask_BHLS = None if mask_BS is None else mask_BS[:, None, None, :]
    out_BHLD = F.scaled_dot_product_attention(
        q_BLHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHD.transpose(1, 2), attn_mask=mask_BHLS
    )
    if mask_BS is not None and out_BHLD.device.type == "cuda":
        out_BHLD = out_BHLD.masked_fill(~mask_BS.any(dim=1)[:, None, None, None], 0)
    return out_BHLD.transpose(1, 2)


def _runs_as(device_type: str, with_lse: bool) -> str:
    return "torch sdpa"


SDPA = Backend(sdpa_attention, None, _runs_as)
