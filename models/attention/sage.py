"""`sage`: SageAttention (Zhang et al. 2024, arXiv:2410.02367 and 2411.10958), scores in 8-bit integers; CUDA only.

This is an approximation: q and k are quantized block by block, so the output differs from other backends by more than
rounding. The package supports no key mask.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from models.attention.backend import Backend, pad_head_dim, require_16_bit
from models.registry import missing_package

HEAD_DIMS = (64, 128)  # head dimensions that every version supports


class SageFunction(Protocol):
    """`sageattention.sageattn`: (B, L, H, D) to the same shape, and lse (B, H, L) if requested."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, tensor_layout: str, sm_scale: float, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return out, and lse if requested."""


@dataclass(frozen=True)
class SagePackage:
    """The installed sageattention.

    Args:
        name: The package's name and version.
        function: The package's attention function.
        returns_lse: Whether the kernel returns the log-sum-exp, as from version 2 on; version 1 ignores the argument.
    """

    name: str
    function: SageFunction
    returns_lse: bool


def sage_package() -> SagePackage:
    """Return the installed sageattention.

    Raises:
        NotImplementedError: The package is not installed, or it does not load.
    """
    if line := missing_package("sage"):
        raise NotImplementedError(line)
    try:
        function = importlib.import_module("sageattention").sageattn
    except ImportError as error:
        raise NotImplementedError(
            f"attention=sage: sageattention is installed but does not load ({error}); "
            "install the build for this PyTorch, or use attention=sdpa"
        ) from error
    name = f"sageattention {importlib.metadata.version('sageattention')}"
    return SagePackage(name, function, "return_lse" in inspect.signature(function).parameters)


def run_package(
    package: SagePackage, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Run SageAttention on heads padded to a supported width, with the scale of the original width.

    Args:
        package: The installed sageattention.
        q_BLHD: Queries, 16 bit.
        k_BSHD: Keys, 16 bit.
        v_BSHD: Values, 16 bit.
        mask_BS: None; a mask is an error.
        with_lse: Whether to compute the log-sum-exp.

    Returns:
        out_BLHD, and lse_BLH if requested.

    Raises:
        NotImplementedError: A mask, 32-bit tensors, a head dimension that is too large, or log-sum-exp with version 1.
    """
    if mask_BS is not None:
        raise NotImplementedError(
            "attention=sage supports no key mask; use attention=sdpa, flash or flex for padded text"
        )
    require_16_bit("sage", q_BLHD)
    width = q_BLHD.shape[-1]
    if width > max(HEAD_DIMS):
        raise NotImplementedError(
            f"attention=sage supports head dimensions up to {max(HEAD_DIMS)}, not {width}; use attention=sdpa"
        )
    if with_lse and not package.returns_lse:
        raise NotImplementedError(
            f"{package.name} returns no log-sum-exp, which ring attention merges; "
            "install version 2, or use attention=flash or flex"
        )
    padded = next(size for size in HEAD_DIMS if size >= width)
    q, k, v = (pad_head_dim(x, padded).contiguous() for x in (q_BLHD, k_BSHD, v_BSHD))
    if not package.returns_lse:
        k = k.clone()  # version 1 subtracts the mean of the keys in place
    result = package.function(q, k, v, tensor_layout="NHD", sm_scale=1.0 / math.sqrt(width), return_lse=with_lse)
    out_BLHD, lse_BHL = result if isinstance(result, tuple) else (result, None)
    return out_BLHD[..., :width], None if lse_BHL is None else lse_BHL.transpose(1, 2)


class SageKernels:
    """The SageAttention kernels; the package is imported at the first call."""

    @cached_property
    def _package(self) -> SagePackage:
        return sage_package()

    def attend(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Return out_BLHD.

        Raises:
            NotImplementedError: Not CUDA, no package, or an input that `run_package` does not support.
        """
        self.kernel_name(q_BLHD.device.type, with_lse=False)
        return run_package(self._package, q_BLHD, k_BSHD, v_BSHD, mask_BS, with_lse=False)[0]

    def attend_lse(
        self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return out_BLHD and lse_BLH.

        Raises:
            NotImplementedError: The cases of `attend`, and version 1 of the package.
        """
        self.kernel_name(q_BLHD.device.type, with_lse=True)
        out_BLHD, lse_BLH = run_package(self._package, q_BLHD, k_BSHD, v_BSHD, mask_BS, with_lse=True)
        assert lse_BLH is not None
        return out_BLHD, lse_BLH

    def kernel_name(self, device_type: str, with_lse: bool) -> str:
        """Return the package and its version.

        Raises:
            NotImplementedError: Not CUDA, or no package.
        """
        if device_type != "cuda":
            raise NotImplementedError(f"attention=sage runs on cuda only, not on {device_type}; use attention=sdpa")
        return self._package.name


_KERNELS = SageKernels()
SAGE = Backend(_KERNELS.attend, _KERNELS.attend_lse, _KERNELS.kernel_name)
"""The backend; no package is looked for and nothing compiled yet."""
