"""The attention kernel in the run's dtype, compared with softmax(q k^T / sqrt(D)) v of the same inputs in float64.

Kernels differ by dtype: flash-attn exists in 16 bits only, and PyTorch's own kernels round and add in another order in
bfloat16. So a run in float32 does not show what a run in bfloat16 computes.

The bound is twice the error of float64 attention with two roundings to the dtype, of its probabilities and of its
output, plus FLOAT32_SUMS. Every kernel has these roundings. `math` rounds its scores too, and is compared with float64
attention of scores that are rounded likewise. In bfloat16 the bound is 0.005, PyTorch's kernels
have 0.002, and a scale off by 1 % makes 0.01. The worst head of a sample counts.

Shapes: B batch, L query tokens, S key tokens, H heads, D channels of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from torch import Tensor, nn

from harness.messages import OperatorError
from models.attention import AttentionKernel, LseKernel
from models.layers import QKVProjection
from models.plan import ParallelPlan
from models.unet.attention import KernelAttention

BATCH, QUERIES, KEYS = 2, 32, 320
"""Sizes of the random inputs; the keys are more than a kernel takes at once."""
LOGIT_STD = 3.0
"""The standard deviation of the scores: large enough that a scale off by 1 % changes the output by 1 %."""
ROUNDS_SCORES = "math"
"""The kernel that rounds its scores to the dtype: the product, and then the product times 1 / sqrt(D)."""
ROUNDING_MULTIPLE = 2.0
FLOAT32_SUMS = 1e-5
"""The error allowed for sums and exponentials in float32; measured is below 1e-6."""
LSE_BOUND = 1e-4
"""The error allowed for a log-sum-exp in float32; a scale off by 1 % changes it by about 1e-2."""


@dataclass(frozen=True)
class AttentionInputs:
    """Random inputs of an attention kernel, already rounded to the dtype.

    Args:
        q_BLHD: queries.
        k_BSHD: keys.
        v_BSHD: values.
        mask_BS: key mask, true = attend; None for all keys.
    """

    q_BLHD: Tensor
    k_BSHD: Tensor
    v_BSHD: Tensor
    mask_BS: Tensor | None


def attention_sizes(network: nn.Module) -> list[tuple[int, int]]:
    """Return the distinct numbers of heads and of channels per head of a network's attention, on this rank.

    Args:
        network: the network, before its projections are fused.
    """
    found: dict[tuple[int, int], None] = {}
    for module in network.modules():
        if isinstance(module, QKVProjection):
            found[len(module.to_q.weight) // module.head_channels, module.head_channels] = None
        elif isinstance(module, DiffusersAttention) and isinstance(module.processor, KernelAttention):
            found[module.heads, module.inner_dim // module.heads] = None
    return list(found)


def takes_mask(plan: ParallelPlan) -> bool:
    """Return whether the blocks of a plan have an argument that masks tokens."""
    return any(name.startswith("mask") for stack in plan.stacks for name in stack.arguments)


def random_inputs(
    heads: int, channels: int, dtype: torch.dtype, device: torch.device, masked: bool, seed: int
) -> AttentionInputs:
    """Return random inputs whose scores have a standard deviation of LOGIT_STD.

    Args:
        heads: the number of heads.
        channels: the number of channels of a head.
        dtype: the dtype of the kernel.
        device: the device that computes.
        masked: whether the second sample has masked keys.
        seed: the seed.

    Returns:
        The inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(BATCH, tokens, heads, channels, generator=generator) for tokens in (QUERIES, KEYS, KEYS))
    mask_BS = torch.arange(KEYS) < torch.tensor([[KEYS], [2 * KEYS // 3]]) if masked else None
    q, k, v = (x.to(device, dtype) for x in (LOGIT_STD * q, k, v))
    return AttentionInputs(q, k, v, None if mask_BS is None else mask_BS.to(device))


def float64_attention(inputs: AttentionInputs, round_scores: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Compute attention in float64.

    Args:
        inputs: the inputs.
        round_scores: whether the scores are rounded to the dtype of the inputs as `math` does.

    Returns:
        out_BLHD; out_BLHD with its probabilities, and then itself, rounded to the dtype once; and lse_BLH.
    """
    dtype = inputs.q_BLHD.dtype
    q_BHLD, k_BHSD, v_BHSD = (x.double().transpose(1, 2) for x in (inputs.q_BLHD, inputs.k_BSHD, inputs.v_BSHD))
    scores_BHLS, scale = q_BHLD @ k_BHSD.transpose(-1, -2), 1.0 / math.sqrt(q_BHLD.shape[-1])
    scores_BHLS = (scores_BHLS.to(dtype).double() * scale).to(dtype).double() if round_scores else scores_BHLS * scale
    if inputs.mask_BS is not None:
        scores_BHLS = scores_BHLS.masked_fill(~inputs.mask_BS[:, None, None, :], float("-inf"))
    weights_BHLS = scores_BHLS.softmax(dim=-1)
    out_BHLD, rounded_BHLD = weights_BHLS @ v_BHSD, (weights_BHLS.to(dtype).double() @ v_BHSD).to(dtype).double()
    return out_BHLD.transpose(1, 2), rounded_BHLD.transpose(1, 2), scores_BHLS.logsumexp(dim=-1).transpose(1, 2)


def worst_head(found: Tensor, exact: Tensor) -> float:
    """Return the largest relative L2 error of a head of a sample; 1 if a number is not finite.

    Args:
        found: the output of a kernel, (B, L, H, D), or a log-sum-exp, (B, L, H).
        exact: the same in float64.

    Returns:
        The error.
    """
    if not bool(found.isfinite().all()):
        return 1.0
    error_BH, size_BH = (
        x.flatten(3).norm(dim=(1, 3)) for x in (found.double()[..., None] - exact[..., None], exact[..., None])
    )
    return float((error_BH / size_BH).max())


def output_error(name: str, kernel: AttentionKernel, inputs: AttentionInputs) -> OperatorError:
    """Return the error of a kernel's worst head.

    Args:
        name: the kernel's name, as the record has it.
        kernel: the kernel.
        inputs: the inputs.

    Returns:
        The error, and its bound.
    """
    exact, bound, _ = _exact_attention(name, inputs)
    out_BLHD = kernel(inputs.q_BLHD, inputs.k_BSHD, inputs.v_BSHD, inputs.mask_BS)
    return OperatorError(_label(name, inputs), _dtype_name(inputs), worst_head(out_BLHD, exact), bound)


def lse_errors(name: str, kernel: LseKernel, inputs: AttentionInputs) -> list[OperatorError]:
    """Return the errors of the worst heads of a kernel's output and log-sum-exp.

    Args:
        name: the kernel's name, as the record has it.
        kernel: the kernel.
        inputs: the inputs.

    Returns:
        The two errors, and their bounds.
    """
    exact, bound, exact_lse = _exact_attention(name, inputs)
    out_BLHD, lse_BLH = kernel(inputs.q_BLHD, inputs.k_BSHD, inputs.v_BSHD, inputs.mask_BS)
    label, dtype = f"{_label(name, inputs)}, for a ring", _dtype_name(inputs)
    return [
        OperatorError(label, dtype, worst_head(out_BLHD, exact), bound),
        OperatorError(f"{label}, log-sum-exp", dtype, worst_head(lse_BLH, exact_lse), LSE_BOUND),
    ]


def _exact_attention(name: str, inputs: AttentionInputs) -> tuple[Tensor, float, Tensor]:
    """Return the exact output, the bound of a kernel's error, and the exact log-sum-exp."""
    exact, rounded, exact_lse = float64_attention(inputs, round_scores=name == ROUNDS_SCORES)
    return exact, ROUNDING_MULTIPLE * worst_head(rounded, exact) + FLOAT32_SUMS, exact_lse


def _label(name: str, inputs: AttentionInputs) -> str:
    heads, channels = inputs.q_BLHD.shape[2:]
    return f"attention ({name}), {heads} heads of {channels}" + ", masked" * (inputs.mask_BS is not None)


def _dtype_name(inputs: AttentionInputs) -> str:
    return str(inputs.q_BLHD.dtype).removeprefix("torch.")
