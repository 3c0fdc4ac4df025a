"""The interface of an attention backend: softmax(q k^T / sqrt(D)) v and, if requested, the log-sum-exp of the scores.

Shapes, here and in the other files of this folder: B batch, L query tokens, S key tokens, H heads, D head dimension. A
backend maps q_BLHD, k_BSHD, v_BSHD to out_BLHD and lse_BLH. `mask_BS` is boolean and true for the keys that take part.
A backend that does not support a mask raises an error; it never ignores the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F


class AttentionKernel(Protocol):
    """Map q_BLHD, k_BSHD, v_BSHD and a boolean key mask_BS (true = attend) to out_BLHD.

    A sample with no key to attend to gets out = 0.
    """

    def __call__(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Return out_BLHD."""


class LseKernel(Protocol):
    """Map the inputs of AttentionKernel to out_BLHD and lse_BLH = log sum_s exp(q k_s / sqrt(D)), in float32 or better.

    A sample with no key to attend to gets out = 0 and lse = -inf, so that a merge gives it no weight.
    """

    def __call__(
        self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return out_BLHD and lse_BLH."""


class KernelName(Protocol):
    """Return the name of the kernel that runs on a device type (`cpu`, `cuda`), with or without log-sum-exp.

    Raises:
        NotImplementedError: No kernel of this backend runs there; the message says what to use or to install.
    """

    def __call__(self, device_type: str, with_lse: bool) -> str:
        """Return the kernel's name."""


@dataclass(frozen=True)
class Backend:
    """One implementation of attention.

    Args:
        attend: The kernel that returns out_BLHD.
        attend_lse: The kernel that returns out_BLHD and lse_BLH; None if the backend has no log-sum-exp.
        kernel_name: The function that names the kernel of a device, for the record.
    """

    attend: AttentionKernel
    attend_lse: LseKernel | None
    kernel_name: KernelName


def unmask_empty_samples(mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask with the keys of empty samples unmasked (no row is then all -inf), and the empty samples."""
    empty_B = ~mask_BS.any(dim=1)
    return mask_BS | empty_B[:, None], empty_B


def zero_empty_samples(out_BLHD: Tensor, lse_BLH: Tensor, empty_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return out and lse with out = 0 and lse = -inf for the empty samples."""
    return (
        out_BLHD.masked_fill(empty_B[:, None, None, None], 0.0),
        lse_BLH.masked_fill(empty_B[:, None, None], float("-inf")),
    )


def pad_head_dim(x_BLHD: Tensor, width: int) -> Tensor:
    """Return the heads padded with zeros to `width`, which changes no score and none of the first D outputs."""
    spare = width - x_BLHD.shape[-1]
    return F.pad(x_BLHD, (0, spare)) if spare else x_BLHD


def require_16_bit(backend: str, x: Tensor) -> None:
    """Raise an error if a tensor is wider than 16 bit, for kernels that support 16 bit only.

    Raises:
        NotImplementedError: The tensor is not 16 bit; the message says what to change.
    """
    if x.element_size() != 2:
        raise NotImplementedError(
            f"attention={backend} computes in 16 bit on CUDA, not in {str(x.dtype).removeprefix('torch.')}; "
            "use model.dtype=bfloat16 or attention=sdpa"
        )
