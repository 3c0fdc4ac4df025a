"""Which backend a name stands for."""

from __future__ import annotations

from models.attention.backend import AttentionKernel, Backend, LseKernel
from models.attention.flash import flash
from models.attention.flex import flex
from models.attention.reference import MATH
from models.attention.sage import sage
from models.attention.sdpa import SDPA
from models.registry import resolve_backend

TABLE: dict[str, Backend] = {"math": MATH, "sdpa": SDPA, "flash": flash(), "flex": flex(), "sage": sage()}


# Those that run at once wherever PyTorch's CPU build does, for tests of networks: flex compiles, sage is CUDA's.
BACKENDS: dict[str, AttentionKernel] = {name: TABLE[name].attend for name in ("math", "sdpa", "flash")}
WITH_LSE: dict[str, LseKernel] = {
    name: one.attend_lse for name, one in TABLE.items() if one.attend_lse is not None and name != "sage"
}


def backend(requested: str) -> Backend:
    """The backend of a name; `auto` is what it is without log-sum-exp (models.registry.resolve_backend).

    Raises:
        ValueError: an unknown name, or a backend whose package is not installed.
    """
    return TABLE[resolve_backend(requested)]


def attention_kernel(requested: str) -> AttentionKernel:
    """The kernel of a backend name.

    Raises:
        ValueError: an unknown name, or a backend whose package is not installed.
    """
    return backend(requested).attend


def lse_kernel(requested: str) -> LseKernel:
    """The kernel of a backend name that returns log-sum-exp, as ring attention needs.

    Raises:
        ValueError: an unknown name, or a backend that returns none, with those that do.
    """
    attend_lse = backend(requested).attend_lse
    if attend_lse is None:
        raise ValueError(
            f"attention.backend={requested} returns no log-sum-exp, which ring attention merges; "
            f"use one of {', '.join(WITH_LSE)}"
        )
    return attend_lse


def resolved_name(requested: str, device_type: str, with_lse: bool = False) -> str:
    """What computes on tensors of `device_type` (`cpu`, `cuda`) when `requested` was asked for, by its own name.

    `torch sdpa`, `torch cpu flash`, `flash-attn 3`, `flash-attn 2`, `flex, compiled`, `flex, unfused`, `sageattention
    2.2.0`, `math`.

    Args:
        with_lse: of the kernel that a ring calls.

    Raises:
        ValueError: an unknown name, a backend whose package is not installed, or one without log-sum-exp.
        NotImplementedError: it does not run on this machine, with what to use or to install, in one line.
    """
    name = resolve_backend(requested, device_type, with_lse)
    if with_lse:
        lse_kernel(name)
    return TABLE[name].runs_as(device_type, with_lse)
