"""`flash`: FlashAttention (Dao et al. 2022; Dao 2023; Shah et al. 2024), in the implementation that is installed.

On CUDA this is flash-attn 3 (`flash_attn_interface`, Hopper only), else flash-attn 2 (`flash_attn`). On the CPU it is
PyTorch's own flash kernel. All return the log-sum-exp. The record names the one that ran.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention.backend import Backend, pad_head_dim, require_16_bit, unmask_empty_samples, zero_empty_samples

MAX_HEAD_DIM = 256  # flash-attn's largest head dimension
HEAD_DIM_MULTIPLE = 8  # flash-attn's head dimensions are multiples of it
INSTALL = "pip install 'triptych[flash]'"


class FlashAttnFunction(Protocol):
    """`flash_attn_func` of either version: (B, L, H, D) to out (B, L, H, D), lse (B, H, L), and further outputs."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, return_attn_probs: bool
    ) -> tuple[Tensor, ...]:
        """Return out, lse and further outputs."""


class FlashAttnVarlenFunction(Protocol):
    """`flash_attn_varlen_func`: concatenated sequences (T, H, D) to out (T, H, D), lse (H, T), and further outputs."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        return_attn_probs: bool,
    ) -> tuple[Tensor, ...]:
        """Return out, lse and further outputs."""


@dataclass(frozen=True)
class FlashPackage:
    """The functions of an installed flash-attn; both versions have the same keywords."""

    name: str
    dense: FlashAttnFunction
    varlen: FlashAttnVarlenFunction


def flash_package() -> FlashPackage:
    """Return the flash-attn package for this GPU: version 3 on Hopper if it is installed, else version 2.

    Raises:
        NotImplementedError: No version is installed, or the installed version does not load.
    """
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    choices = [("flash_attn_interface", "flash-attn 3")] if hopper else []
    for module, name in [*choices, ("flash_attn", "flash-attn 2")]:
        if importlib.util.find_spec(module) is None:
            continue
        try:
            imported = importlib.import_module(module)
        except ImportError as error:
            raise NotImplementedError(
                f"attention=flash: {name} is installed but does not load ({error}); "
                "install the build for this PyTorch, or use attention=sdpa"
            ) from error
        return FlashPackage(name, imported.flash_attn_func, imported.flash_attn_varlen_func)
    raise NotImplementedError(
        f"attention=flash on CUDA needs the flash-attn package: {INSTALL}, or use attention=sdpa, or flex in a ring"
    )


def run_package(
    package: FlashPackage, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run flash-attn on heads padded to a supported width, with the scale of the original width.

    Args:
        package: The installed flash-attn.
        q_BLHD: Queries, 16 bit.
        k_BSHD: Keys, 16 bit.
        v_BSHD: Values, 16 bit.
        mask_BS: Key mask, true = attend; None attends to all keys.

    Returns:
        out_BLHD and lse_BLH.

    Raises:
        NotImplementedError: The tensors are 32 bit, or the head dimension is too large.
    """
    require_16_bit("flash", q_BLHD)
    width = q_BLHD.shape[-1]
    if width > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"attention=flash supports head dimensions up to {MAX_HEAD_DIM} on CUDA, not {width}; use attention=sdpa"
        )
    q, k, v = (pad_head_dim(x, -(-width // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE) for x in (q_BLHD, k_BSHD, v_BSHD))
    scale = 1.0 / math.sqrt(width)
    if mask_BS is None:
        out_BLHD, lse_BHL, *_ = package.dense(q, k, v, softmax_scale=scale, return_attn_probs=True)
        return out_BLHD[..., :width], lse_BHL.transpose(1, 2)
    out_BLHD, lse_BLH = _run_varlen(package, q, k, v, mask_BS, scale)
    return zero_empty_samples(out_BLHD[..., :width], lse_BLH, ~mask_BS.any(dim=1))


def _run_varlen(
    package: FlashPackage, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return out_BLHD and lse_BLH under a key mask that is passed as sequence lengths, computed on the device.

    The unmasked keys move to the front of their sample; attention does not depend on their order. The masked keys
    behind them form a sequence of their own that has no queries: queries of lengths L, 0, L, 0 ... meet keys of lengths
    n, S - n, m, S - m ... No tensor needs a size that only the device knows.
    """
    (batch, queries), keys = q_BLHD.shape[:2], k_BSHD.shape[1]
    starts_B = torch.arange(batch, device=mask_BS.device) * keys
    order_BS = (~mask_BS).to(torch.int32).argsort(dim=1, stable=True) + starts_B[:, None]
    k_THD, v_THD = (x.flatten(0, 1).index_select(0, order_BS.flatten()) for x in (k_BSHD, v_BSHD))
    ends_q = (torch.arange(batch, device=mask_BS.device) + 1).repeat_interleave(2) * queries
    ends_k = torch.stack([starts_B + mask_BS.sum(dim=1), starts_B + keys], dim=1).flatten()
    out_THD, lse_HT, *_ = package.varlen(
        q_BLHD.flatten(0, 1),
        k_THD,
        v_THD,
        cu_seqlens_q=F.pad(ends_q, (1, 0)).to(torch.int32),
        cu_seqlens_k=F.pad(ends_k, (1, 0)).to(torch.int32),
        max_seqlen_q=queries,
        max_seqlen_k=keys,
        softmax_scale=scale,
        return_attn_probs=True,
    )
    return out_THD.unflatten(0, (batch, queries)), lse_HT.unflatten(1, (batch, queries)).permute(1, 2, 0)


def run_cpu_flash(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run PyTorch's CPU flash kernel, with the key mask as an additive bias."""
    bias_B11S, empty_B = None, None
    if mask_BS is not None:
        mask_BS, empty_B = unmask_empty_samples(mask_BS)
        bias_B11S = torch.zeros(mask_BS.shape, dtype=q_BLHD.dtype, device=q_BLHD.device)
        bias_B11S = bias_B11S.masked_fill(~mask_BS, float("-inf"))[:, None, None, :]
    out_BHLD, lse_BHL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BLHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHD.transpose(1, 2), attn_mask=bias_B11S
    )
    out_BLHD, lse_BLH = out_BHLD.transpose(1, 2), lse_BHL.transpose(1, 2)
    return (out_BLHD, lse_BLH) if empty_B is None else zero_empty_samples(out_BLHD, lse_BLH, empty_B)


class FlashKernels:
    """The FlashAttention kernels of each device; the package is imported at the first call on CUDA."""

    @cached_property
    def _package(self) -> FlashPackage:
        return flash_package()

    def attend(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Return out_BLHD.

        Raises:
            NotImplementedError: No kernel for this device, dtype or head dimension.
        """
        return self.attend_lse(q_BLHD, k_BSHD, v_BSHD, mask_BS)[0]

    def attend_lse(
        self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return out_BLHD and lse_BLH, which every implementation computes anyway.

        Raises:
            NotImplementedError: No kernel for this device, dtype or head dimension.
        """
        if q_BLHD.device.type == "cpu":
            return run_cpu_flash(q_BLHD, k_BSHD, v_BSHD, mask_BS)
        self.kernel_name(q_BLHD.device.type, with_lse=True)
        return run_package(self._package, q_BLHD, k_BSHD, v_BSHD, mask_BS)

    def kernel_name(self, device_type: str, with_lse: bool) -> str:
        """Return `torch cpu flash`, `flash-attn 3` or `flash-attn 2`.

        Raises:
            NotImplementedError: Another device, or CUDA without the package.
        """
        if device_type == "cpu":
            return "torch cpu flash"
        if device_type != "cuda":
            raise NotImplementedError(f"attention=flash runs on cuda and cpu, not on {device_type}; use attention=sdpa")
        return self._package.name


_KERNELS = FlashKernels()
FLASH = Backend(_KERNELS.attend, _KERNELS.attend_lse, _KERNELS.kernel_name)
"""The backend; no package is looked for and nothing compiled yet."""
