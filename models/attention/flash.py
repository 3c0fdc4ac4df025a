"""`flash`: FlashAttention (Dao et al. 2022; Dao 2023; Shah et al. 2024), whichever of its implementations is here.

On CUDA flash-attn 3 (`flash_attn_interface`, Hopper only), else flash-attn 2 (`flash_attn`); on the CPU PyTorch's own
flash kernel. All return the log-sum-exp. Which one computed is named in the record.
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

from models.attention.backend import Backend, let_in, only_half, silence, widened

WIDEST = 256  # flash-attn's largest head dimension
MULTIPLE = 8  # and what it must be a multiple of
INSTALL = "pip install 'triptych[flash]'"


class Dense(Protocol):
    """`flash_attn_func` of either generation: (B, L, H, D) to out (B, L, H, D), lse (B, H, L), and what else it has."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, return_attn_probs: bool
    ) -> tuple[Tensor, ...]: ...


class Varlen(Protocol):
    """`flash_attn_varlen_func`: sequences behind one another, (T, H, D) to out (T, H, D), lse (H, T), and what else."""

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
    ) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class FlashPackage:
    """The functions of an installed flash-attn, whose keywords are the same in both generations."""

    name: str
    dense: Dense
    varlen: Varlen


def flash_package() -> FlashPackage:
    """The flash-attn that fits this GPU: 3 on Hopper where it is installed, else 2.

    Raises:
        NotImplementedError: none is installed, or what is installed does not load.
    """
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    choices = [("flash_attn_interface", "flash-attn 3")] if hopper else []
    for module, name in [*choices, ("flash_attn", "flash-attn 2")]:
        if importlib.util.find_spec(module) is None:
            continue
        try:
            found = importlib.import_module(module)
        except ImportError as broken:
            raise NotImplementedError(
                f"attention=flash: {name} is installed but does not load ({broken}); "
                "install the build for this PyTorch, or use attention=sdpa"
            ) from broken
        return FlashPackage(name, found.flash_attn_func, found.flash_attn_varlen_func)
    raise NotImplementedError(
        f"attention=flash on CUDA needs the flash-attn package: {INSTALL}, or use attention=sdpa, or flex in a ring"
    )


def with_package(
    package: FlashPackage, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None
) -> tuple[Tensor, Tensor]:
    """flash-attn on heads padded to a width that it has, at the scale of the true one.

    Raises:
        NotImplementedError: 32-bit tensors, or heads that are too wide.
    """
    only_half("flash", q_BLHD)
    width = q_BLHD.shape[-1]
    if width > WIDEST:
        raise NotImplementedError(
            f"attention=flash has head dimensions up to {WIDEST} on CUDA, not {width}; use attention=sdpa"
        )
    q, k, v = (widened(x, -(-width // MULTIPLE) * MULTIPLE) for x in (q_BLHD, k_BSHD, v_BSHD))
    scale = 1.0 / math.sqrt(width)
    if mask_BS is None:
        out_BLHD, lse_BHL, *_ = package.dense(q, k, v, softmax_scale=scale, return_attn_probs=True)
        return out_BLHD[..., :width], lse_BHL.transpose(1, 2)
    out_BLHD, lse_BLH = _masked(package, q, k, v, mask_BS, scale)
    return silence(out_BLHD[..., :width], lse_BLH, ~mask_BS.any(dim=1))


def _masked(
    package: FlashPackage, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """A key mask by lengths, all on the device.

    The keys that take part are moved to the front of their sample (attention does not depend on their order); what is
    left behind them is a sequence of its own to which no query belongs: queries L, 0, L, 0 ... meet keys n, S - n,
    m, S - m ... So nothing has to be packed to a size that only the device knows.
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


def on_cpu(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    """PyTorch's CPU flash kernel, which takes the key mask as an additive bias."""
    bias_B11S, empty_B = None, None
    if mask_BS is not None:
        mask_BS, empty_B = let_in(mask_BS)
        bias_B11S = torch.zeros(mask_BS.shape, dtype=q_BLHD.dtype, device=q_BLHD.device)
        bias_B11S = bias_B11S.masked_fill(~mask_BS, float("-inf"))[:, None, None, :]
    out_BHLD, lse_BHL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BLHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHD.transpose(1, 2), attn_mask=bias_B11S
    )
    out_BLHD, lse_BLH = out_BHLD.transpose(1, 2), lse_BHL.transpose(1, 2)
    return (out_BLHD, lse_BLH) if empty_B is None else silence(out_BLHD, lse_BLH, empty_B)


class Flash:
    """FlashAttention by device; the package is looked for at the first call on CUDA."""

    @cached_property
    def _package(self) -> FlashPackage:
        return flash_package()

    def attend(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """out_BLHD.

        Raises:
            NotImplementedError: a device, dtype or head dimension that has no kernel.
        """
        return self.attend_lse(q_BLHD, k_BSHD, v_BSHD, mask_BS)[0]

    def attend_lse(
        self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """out_BLHD and lse_BLH, which every implementation computes anyway.

        Raises:
            NotImplementedError: a device, dtype or head dimension that has no kernel.
        """
        if q_BLHD.device.type == "cpu":
            return on_cpu(q_BLHD, k_BSHD, v_BSHD, mask_BS)
        self.runs_as(q_BLHD.device.type, with_lse=True)
        return with_package(self._package, q_BLHD, k_BSHD, v_BSHD, mask_BS)

    def runs_as(self, device_type: str, with_lse: bool) -> str:
        """`torch cpu flash`, `flash-attn 3` or `flash-attn 2`.

        Raises:
            NotImplementedError: another device, or CUDA without the package.
        """
        if device_type == "cpu":
            return "torch cpu flash"
        if device_type != "cuda":
            raise NotImplementedError(f"attention=flash runs on cuda and cpu, not on {device_type}; use attention=sdpa")
        return self._package.name


def flash() -> Backend:
    """The backend, with nothing looked for yet."""
    kernels = Flash()
    return Backend(kernels.attend, kernels.attend_lse, kernels.runs_as)
