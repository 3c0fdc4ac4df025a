"""`sage`: SageAttention (Zhang et al. 2024, arXiv:2410.02367 and 2411.10958), scores in 8-bit integers; CUDA only.

An approximation: q and k are quantised a block at a time, so what it draws differs from the other backends by more than
rounding. The package takes no key mask.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from models.attention.backend import Backend, only_half, widened
from models.registry import missing_package

WIDTHS = (64, 128)  # head dimensions that every version has


class SageFunction(Protocol):
    """`sageattention.sageattn`: (B, L, H, D) to the same, and lse (B, H, L) beside it where asked."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, tensor_layout: str, sm_scale: float, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class SagePackage:
    """The installed sageattention.

    Args:
        gives_lse: from version 2 on; version 1 takes the argument and ignores it.
    """

    name: str
    function: SageFunction
    gives_lse: bool


def sage_package() -> SagePackage:
    """The installed sageattention.

    Raises:
        NotImplementedError: there is none, or it does not load.
    """
    if line := missing_package("sage"):
        raise NotImplementedError(line)
    try:
        function = importlib.import_module("sageattention").sageattn
    except ImportError as broken:
        raise NotImplementedError(
            f"attention=sage: sageattention is installed but does not load ({broken}); "
            "install the build for this PyTorch, or use attention=sdpa"
        ) from broken
    name = f"sageattention {importlib.metadata.version('sageattention')}"
    return SagePackage(name, function, "return_lse" in inspect.signature(function).parameters)


def with_package(
    package: SagePackage, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """SageAttention on heads padded to a width that it has, at the scale of the true one.

    Raises:
        NotImplementedError: a mask, 32-bit tensors, heads that are too wide, or log-sum-exp of version 1.
    """
    if mask_BS is not None:
        raise NotImplementedError("attention=sage takes no key mask; use attention=sdpa, flash or flex for padded text")
    only_half("sage", q_BLHD)
    width = q_BLHD.shape[-1]
    if width > max(WIDTHS):
        raise NotImplementedError(
            f"attention=sage has head dimensions up to {max(WIDTHS)}, not {width}; use attention=sdpa"
        )
    if with_lse and not package.gives_lse:
        raise NotImplementedError(
            f"{package.name} returns no log-sum-exp, which ring attention merges; "
            "install version 2, or use attention=flash or flex"
        )
    wide = next(one for one in WIDTHS if one >= width)
    q, k, v = (widened(x, wide).contiguous() for x in (q_BLHD, k_BSHD, v_BSHD))
    if not package.gives_lse:
        k = k.clone()  # version 1 subtracts the mean of the keys in place
    found = package.function(q, k, v, tensor_layout="NHD", sm_scale=1.0 / math.sqrt(width), return_lse=with_lse)
    out_BLHD, lse_BHL = found if isinstance(found, tuple) else (found, None)
    return out_BLHD[..., :width], None if lse_BHL is None else lse_BHL.transpose(1, 2)


class Sage:
    """SageAttention; the package is looked for at the first call."""

    @cached_property
    def _package(self) -> SagePackage:
        return sage_package()

    def attend(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """out_BLHD.

        Raises:
            NotImplementedError: not CUDA, no package, or what `with_package` refuses.
        """
        self.runs_as(q_BLHD.device.type, with_lse=False)
        return with_package(self._package, q_BLHD, k_BSHD, v_BSHD, mask_BS, with_lse=False)[0]

    def attend_lse(
        self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """out_BLHD and lse_BLH.

        Raises:
            NotImplementedError: as `attend`, and version 1 of the package.
        """
        self.runs_as(q_BLHD.device.type, with_lse=True)
        out_BLHD, lse_BLH = with_package(self._package, q_BLHD, k_BSHD, v_BSHD, mask_BS, with_lse=True)
        assert lse_BLH is not None
        return out_BLHD, lse_BLH

    def runs_as(self, device_type: str, with_lse: bool) -> str:
        """The package and its version.

        Raises:
            NotImplementedError: not CUDA, or no package.
        """
        if device_type != "cuda":
            raise NotImplementedError(f"attention=sage runs on cuda only, not on {device_type}; use attention=sdpa")
        return self._package.name


def sage() -> Backend:
    """The backend, with nothing looked for yet."""
    kernels = Sage()
    return Backend(kernels.attend, kernels.attend_lse, kernels.runs_as)
