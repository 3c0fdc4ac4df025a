"""Attention backends by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.attention.backend import AttentionKernel, Backend, LseKernel
from models.registry import ATTENTION_BACKENDS, missing_package, resolve_backend, returns_lse
from schedulers.registry import imported


def backend(requested: str, options: Mapping[str, Any] | None = None) -> Backend:
    """Return the backend of a name; `auto` means the one without log-sum-exp (models.registry.resolve_backend).

    Args:
        requested: A backend name, or `auto`.
        options: The options that its plug-in declared; a plug-in that declares some registers a function of them.

    Returns:
        The backend.

    Raises:
        ValueError: An unknown name, or a backend whose package is not installed.
    """
    name = resolve_backend(requested)
    target = imported(ATTENTION_BACKENDS[name].backend)
    found: Backend = target(**options) if options else target
    return found if ATTENTION_BACKENDS[name].masks else _without_masks(name, found)


def _without_masks(name: str, found: Backend) -> Backend:
    """Return a backend that refuses a mask, which its kernels would not see."""

    def refuse(mask_BS: Tensor | None) -> None:
        if mask_BS is not None:
            raise ValueError(f"attention.backend={name} takes no mask, and this network masks keys; use attention=sdpa")

    def attend(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        refuse(mask_BS)
        return found.attend(q_BLHD, k_BSHD, v_BSHD)

    attend_lse = found.attend_lse
    if attend_lse is None:
        return replace(found, attend=attend)

    def with_lse(
        q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        refuse(mask_BS)
        return attend_lse(q_BLHD, k_BSHD, v_BSHD)

    return replace(found, attend=attend, attend_lse=with_lse)


def attention_kernel(requested: str, options: Mapping[str, Any] | None = None) -> AttentionKernel:
    """Return the kernel of a backend name and its options.

    Raises:
        ValueError: An unknown name, or a backend whose package is not installed.
    """
    return backend(requested, options).attend


def lse_kernel(requested: str, options: Mapping[str, Any] | None = None) -> LseKernel:
    """Return the kernel of a backend name and its options that also returns the log-sum-exp, as ring attention needs.

    Raises:
        ValueError: An unknown name, or a backend without log-sum-exp; the message lists those that have it.
    """
    attend_lse = backend(requested, options).attend_lse
    if attend_lse is None:
        names = [name for name in ATTENTION_BACKENDS if returns_lse(name) and not missing_package(name)]
        raise ValueError(
            f"attention.backend={requested} returns no log-sum-exp, which ring attention merges; "
            f"use one of {', '.join(names)}"
        )
    return attend_lse


def resolved_name(
    requested: str, device_type: str, with_lse: bool = False, options: Mapping[str, Any] | None = None
) -> str:
    """Return the name of the kernel that a backend name runs on a device.

    Such a name is `torch sdpa`, `torch cpu flash`, `flash-attn 3`, `flash-attn 2`, `flex, compiled`, `flex, unfused`,
    `sageattention 2.2.0` or `math`.

    Args:
        requested: A backend name, or `auto`.
        device_type: The device type of the tensors, `cpu` or `cuda`.
        with_lse: Whether ring attention calls the kernel, which needs the log-sum-exp.
        options: The options of the backend.

    Returns:
        The kernel's own name.

    Raises:
        ValueError: An unknown name, a backend whose package is not installed, or one without log-sum-exp.
        NotImplementedError: The backend does not run on this machine; the message says what to use or to install.
    """
    name = resolve_backend(requested, device_type, with_lse)
    devices = ATTENTION_BACKENDS[name].devices
    if devices and device_type not in devices:
        raise NotImplementedError(
            f"attention.backend={name} runs on {' and '.join(devices)}, not on {device_type}; use attention=sdpa"
        )
    if with_lse:
        lse_kernel(name, options)
    return backend(name, options).kernel_name(device_type, with_lse)


# The backends that run on any CPU without compiling, for tests of networks: flex compiles, sage needs CUDA.
BACKENDS: dict[str, AttentionKernel] = {name: attention_kernel(name) for name in ("math", "sdpa", "flash")}
WITH_LSE: dict[str, LseKernel] = {name: lse_kernel(name) for name in ("math", "flash", "flex")}
