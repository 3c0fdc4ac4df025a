"""The table of attention backends by name."""

from __future__ import annotations

from models.attention.backend import AttentionKernel, Backend, LseKernel
from models.attention.flash import flash
from models.attention.flex import flex
from models.attention.reference import MATH
from models.attention.sage import sage
from models.attention.sdpa import SDPA
from models.registry import resolve_backend

TABLE: dict[str, Backend] = {"math": MATH, "sdpa": SDPA, "flash": flash(), "flex": flex(), "sage": sage()}


# The backends that run on any CPU without compiling, for tests of networks: flex compiles, sage needs CUDA.
BACKENDS: dict[str, AttentionKernel] = {name: TABLE[name].attend for name in ("math", "sdpa", "flash")}
WITH_LSE: dict[str, LseKernel] = {
    name: entry.attend_lse for name, entry in TABLE.items() if entry.attend_lse is not None and name != "sage"
}


def backend(requested: str) -> Backend:
    """Return the backend of a name; `auto` means the one without log-sum-exp (models.registry.resolve_backend).

    Raises:
        ValueError: An unknown name, or a backend whose package is not installed.
    """
    return TABLE[resolve_backend(requested)]


def attention_kernel(requested: str) -> AttentionKernel:
    """Return the kernel of a backend name.

    Raises:
        ValueError: An unknown name, or a backend whose package is not installed.
    """
    return backend(requested).attend


def lse_kernel(requested: str) -> LseKernel:
    """Return the kernel of a backend name that also returns the log-sum-exp, as ring attention needs.

    Raises:
        ValueError: An unknown name, or a backend without log-sum-exp; the message lists those that have it.
    """
    attend_lse = backend(requested).attend_lse
    if attend_lse is None:
        raise ValueError(
            f"attention.backend={requested} returns no log-sum-exp, which ring attention merges; "
            f"use one of {', '.join(WITH_LSE)}"
        )
    return attend_lse


def resolved_name(requested: str, device_type: str, with_lse: bool = False) -> str:
    """Return the name of the kernel that a backend name runs on a device.

    Such a name is `torch sdpa`, `torch cpu flash`, `flash-attn 3`, `flash-attn 2`, `flex, compiled`, `flex, unfused`,
    `sageattention 2.2.0` or `math`.

    Args:
        requested: A backend name, or `auto`.
        device_type: The device type of the tensors, `cpu` or `cuda`.
        with_lse: Whether ring attention calls the kernel, which needs the log-sum-exp.

    Returns:
        The kernel's own name.

    Raises:
        ValueError: An unknown name, a backend whose package is not installed, or one without log-sum-exp.
        NotImplementedError: The backend does not run on this machine; the message says what to use or to install.
    """
    name = resolve_backend(requested, device_type, with_lse)
    if with_lse:
        lse_kernel(name)
    return TABLE[name].kernel_name(device_type, with_lse)
