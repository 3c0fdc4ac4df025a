"""`flex`: FlexAttention (Dong et al. 2024, arXiv:2412.05496), a kernel that torch.compile makes for each kind of mask.

The key mask is a score modification that is compiled into the kernel. Every shape, dtype and kind of mask has its own
kernel: on a CPU, a kernel for dynamic shapes does not compile once there is a mask. There the first call takes 4 to 12
s for each kernel (torch 2.13, one core), and about 10 s more for the first one on a machine. The CPU kernel supports
neither log-sum-exp nor float64. These run unfused, with all scores in memory, and the record says so.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from models.attention.backend import Backend

MAX_KERNELS = 256  # compiled kernels in memory; torch.compile's own limit is no higher


class CompiledAttention(Protocol):
    """The signature of `_attend` after compilation."""

    def __call__(
        self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return out_BLHD, and lse_BLH if requested."""


def _attend(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return out_BLHD, and lse_BLH if requested; this function is what torch.compile compiles."""

    def mask_scores(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert mask_BS is not None
        return torch.where(mask_BS[b, key], score, -float("inf"))

    out_BHLD, aux = flex_attention(
        q_BLHD.transpose(1, 2),
        k_BSHD.transpose(1, 2),
        v_BSHD.transpose(1, 2),
        score_mod=None if mask_BS is None else mask_scores,
        return_aux=AuxRequest(lse=with_lse),
    )
    return out_BHLD.transpose(1, 2), None if aux.lse is None else aux.lse.transpose(1, 2)


def _compile(compiler: str, dynamic: bool) -> CompiledAttention:
    kernel: CompiledAttention = torch.compile(  # type: ignore[call-overload]  # torch's overloads lack the last two
        _attend,
        backend=compiler,
        fullgraph=True,
        dynamic=dynamic,
        recompile_limit=MAX_KERNELS,
        isolate_recompiles=True,
    )
    return kernel


class FlexKernels:
    """The FlexAttention kernels, compiled at the first call."""

    def __init__(self) -> None:
        self._fused: CompiledAttention | None = None

    @cached_property
    def _unfused(self) -> CompiledAttention:
        """The traced, uncompiled kernel; an untraced call would warn that it is not compiled."""
        return _compile("eager", dynamic=True)

    def attend(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Return out_BLHD.

        Raises:
            NotImplementedError: This machine cannot compile the kernel.
        """
        return self._run(q_BLHD, k_BSHD, v_BSHD, mask_BS, with_lse=False)[0]

    def attend_lse(
        self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return out_BLHD and lse_BLH."""
        out_BLHD, lse_BLH = self._run(q_BLHD, k_BSHD, v_BSHD, mask_BS, with_lse=True)
        assert lse_BLH is not None
        return out_BLHD, lse_BLH

    def _run(
        self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        device_type = q_BLHD.device.type
        if q_BLHD.dtype is torch.float64 or not _has_kernel(device_type, with_lse):
            return self._unfused(q_BLHD, k_BSHD, v_BSHD, mask_BS, with_lse)
        if self._fused is None:
            self.kernel_name(device_type, with_lse)
            self._fused = _compile("inductor", dynamic=False)
        return self._fused(q_BLHD, k_BSHD, v_BSHD, mask_BS, with_lse)

    def kernel_name(self, device_type: str, with_lse: bool) -> str:
        """Return `flex, compiled` or `flex, unfused`.

        Raises:
            NotImplementedError: This machine cannot compile the kernel.
        """
        if not _has_kernel(device_type, with_lse):
            return "flex, unfused"
        if missing := _missing_on_cpu() if device_type == "cpu" else _missing_on_cuda():
            raise NotImplementedError(f"attention=flex compiles its kernel, which needs {missing}; use attention=sdpa")
        return "flex, compiled"


def _has_kernel(device_type: str, with_lse: bool) -> bool:
    return device_type == "cuda" or (device_type == "cpu" and not with_lse)


def _missing_on_cpu() -> str:
    """Return what the compiled CPU kernel needs and this machine lacks, or an empty string."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return "a CPU with AVX2"
    compiler = os.environ.get("CXX", "g++")
    return "" if shutil.which(compiler) else f"a C++ compiler ({compiler} is not there: apt-get install g++)"


def _missing_on_cuda() -> str:
    return "" if importlib.util.find_spec("triton") else "the triton package (pip install triton)"


_KERNELS = FlexKernels()
FLEX = Backend(_KERNELS.attend, _KERNELS.attend_lse, _KERNELS.kernel_name)
"""The backend; no package is looked for and nothing compiled yet."""
