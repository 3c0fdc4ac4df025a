"""`flex`: FlexAttention (Dong et al. 2024, arXiv:2412.05496), a kernel that torch.compile makes for the mask at hand.

The key mask is a change of the scores that is compiled into the kernel, and every shape, dtype and kind of mask has a
kernel of its own: on a CPU one that serves several shapes does not compile once there is a mask. There the first call
takes 4 to 12 s for each (torch 2.13, one core), and some 10 s more for the first of a machine. The CPU's kernel has
neither log-sum-exp nor float64; these run unfused, with all scores in memory, and the record says so.
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

SHAPES = 256  # kernels kept; torch.compile's own cap is no higher


class Flexible(Protocol):
    """`_attend`, compiled."""

    def __call__(
        self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]: ...


def _attend(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """What is compiled: out_BLHD, and lse_BLH where asked."""

    def masked(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert mask_BS is not None
        return torch.where(mask_BS[b, key], score, -float("inf"))

    out_BHLD, aux = flex_attention(
        q_BLHD.transpose(1, 2),
        k_BSHD.transpose(1, 2),
        v_BSHD.transpose(1, 2),
        score_mod=None if mask_BS is None else masked,
        return_aux=AuxRequest(lse=with_lse),
    )
    return out_BHLD.transpose(1, 2), None if aux.lse is None else aux.lse.transpose(1, 2)


def _compiled(compiler: str, dynamic: bool) -> Flexible:
    kernel: Flexible = torch.compile(  # type: ignore[call-overload]  # torch's overloads lack the last two
        _attend,
        backend=compiler,
        fullgraph=True,
        dynamic=dynamic,
        recompile_limit=SHAPES,
        isolate_recompiles=True,
    )
    return kernel


class Flex:
    """FlexAttention, compiled at the first call."""

    def __init__(self) -> None:
        self._fused: Flexible | None = None

    @cached_property
    def _unfused(self) -> Flexible:
        """Traced but not compiled; called untraced it would warn that it is not compiled."""
        return _compiled("eager", dynamic=True)

    def attend(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """out_BLHD.

        Raises:
            NotImplementedError: a CPU or a machine that compiles no kernel.
        """
        return self._run(q_BLHD, k_BSHD, v_BSHD, mask_BS, with_lse=False)[0]

    def attend_lse(
        self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """out_BLHD and lse_BLH."""
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
            self.runs_as(device_type, with_lse)
            self._fused = _compiled("inductor", dynamic=False)
        return self._fused(q_BLHD, k_BSHD, v_BSHD, mask_BS, with_lse)

    def runs_as(self, device_type: str, with_lse: bool) -> str:
        """`flex, compiled` or `flex, unfused`.

        Raises:
            NotImplementedError: a CPU or a machine that compiles no kernel.
        """
        if not _has_kernel(device_type, with_lse):
            return "flex, unfused"
        if lacking := _cpu_lacks() if device_type == "cpu" else _cuda_lacks():
            raise NotImplementedError(f"attention=flex compiles its kernel, which needs {lacking}; use attention=sdpa")
        return "flex, compiled"


def _has_kernel(device_type: str, with_lse: bool) -> bool:
    return device_type == "cuda" or (device_type == "cpu" and not with_lse)


def _cpu_lacks() -> str:
    """What the CPU's compiled kernel needs and this machine has not, or nothing."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return "a CPU with AVX2"
    compiler = os.environ.get("CXX", "g++")
    return "" if shutil.which(compiler) else f"a C++ compiler ({compiler} is not there: apt-get install g++)"


def _cuda_lacks() -> str:
    return "" if importlib.util.find_spec("triton") else "the triton package (pip install triton)"


def flex() -> Backend:
    """The backend, with nothing compiled yet."""
    kernels = Flex()
    return Backend(kernels.attend, kernels.attend_lse, kernels.runs_as)
