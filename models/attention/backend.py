"""What an attention backend is: softmax(q k^T / sqrt(D)) v and, when asked, the log-sum-exp of its scores.

Shapes, here and in every file beside this one: B batch, L query tokens, S key tokens, H heads, D head dimension. A
backend maps q_BLHD, k_BSHD, v_BSHD to out_BLHD and lse_BLH; `mask_BS` is boolean and true where a key takes part. A
backend that cannot honour a mask refuses it, it never drops it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F


class AttentionKernel(Protocol):
    """q_BLHD, k_BSHD, v_BSHD and a boolean key mask_BS (true = attend) to out_BLHD.

    A sample none of whose keys take part gets out = 0.
    """

    def __call__(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor: ...


class LseKernel(Protocol):
    """The same to out_BLHD and lse_BLH = log sum_s exp(q k_s / sqrt(D)), in float32 or better.

    A sample none of whose keys take part gets out = 0 and lse = -inf, which a merge leaves out.
    """

    def __call__(
        self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


class RunsAs(Protocol):
    """What computes on tensors of a device type (`cpu`, `cuda`), by its own name, with or without log-sum-exp.

    Raises:
        NotImplementedError: nothing of this backend runs there, with what to use or to install, in one line.
    """

    def __call__(self, device_type: str, with_lse: bool) -> str: ...


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Args:
        attend: gives out_BLHD.
        attend_lse: gives out_BLHD and lse_BLH; None where the backend has no log-sum-exp.
        runs_as: names what computes on a device, for the record.
    """

    attend: AttentionKernel
    attend_lse: LseKernel | None
    runs_as: RunsAs


def let_in(mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The mask with every key of an empty sample let in, so that no row is all -inf, and which samples are empty."""
    empty_B = ~mask_BS.any(dim=1)
    return mask_BS | empty_B[:, None], empty_B


def silence(out_BLHD: Tensor, lse_BLH: Tensor, empty_B: Tensor) -> tuple[Tensor, Tensor]:
    """out = 0 and lse = -inf for the samples that are empty."""
    return (
        out_BLHD.masked_fill(empty_B[:, None, None, None], 0.0),
        lse_BLH.masked_fill(empty_B[:, None, None], float("-inf")),
    )


def widened(x_BLHD: Tensor, width: int) -> Tensor:
    """Heads padded with zeros to `width`, which leaves every score and the first D of every output as they are."""
    spare = width - x_BLHD.shape[-1]
    return F.pad(x_BLHD, (0, spare)) if spare else x_BLHD


def only_half(backend: str, x: Tensor) -> None:
    """Refuses tensors wider than 16 bit, for kernels that have no other.

    Raises:
        NotImplementedError: with what to change.
    """
    if x.element_size() != 2:
        raise NotImplementedError(
            f"attention={backend} computes in 16 bit on CUDA, not in {str(x.dtype).removeprefix('torch.')}; "
            "use model.dtype=bfloat16 or attention=sdpa"
        )
