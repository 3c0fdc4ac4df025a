"""`sdpa`: PyTorch's own function, which picks among its fused kernels by device, dtype and shape."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from models.attention.backend import Backend


def sdpa_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """Compute `torch.nn.functional.scaled_dot_product_attention`.

    A sample without unmasked keys gets 0; cuDNN's kernel would return the mean of its values.

    Args:
        q_BLHD: Queries.
        k_BSHD: Keys.
        v_BSHD: Values.
        mask_BS: Key mask, true = attend; None attends to all keys.

    Returns:
        out_BLHD.
    """
    mask_BHLS = None if mask_BS is None else mask_BS[:, None, None, :]
    out_BHLD = F.scaled_dot_product_attention(
        q_BLHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHD.transpose(1, 2), attn_mask=mask_BHLS
    )
    if mask_BS is not None and out_BHLD.device.type == "cuda":
        out_BHLD = out_BHLD.masked_fill(~mask_BS.any(dim=1)[:, None, None, None], 0)
    return out_BHLD.transpose(1, 2)


def _kernel_name(device_type: str, with_lse: bool) -> str:
    return "torch sdpa"


SDPA = Backend(sdpa_attention, None, _kernel_name)
