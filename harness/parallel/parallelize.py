"""Applies a layout to a network from outside, by the plan that its package states: tokens and linears are sharded.

The network stays as it was written for one device. Its attention kernel is replaced by one over sharded tokens. A
runner shards what goes into a stack of blocks, and gathers what comes out. Linears are replaced by their slices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.parallel.attention import SequenceAttention, SequenceState, TokenLayout
from harness.parallel.displaced import DisplacedPatches
from harness.parallel.group import Group
from harness.parallel.process_groups import ProcessGroups
from models.attention import AttentionKernel
from models.attention.lse import LseKernel
from models.blocks import Runner, Shared, Streams, block_stack
from models.plan import ParallelPlan, Stack
from models.tensor_slice import TensorSlice


def shard_tokens(
    network: nn.Module,
    plan: ParallelPlan,
    kernel: AttentionKernel,
    ring_kernel: LseKernel | None,
    groups: ProcessGroups,
    gather: bool = False,
    displaced: DisplacedPatches | None = None,
    state: SequenceState | None = None,
) -> TokenSharding:
    """Apply sequence parallelism in place, apart from the runners of the blocks, which the result wraps.

    Args:
        network: the network, written for one device.
        plan: how the network can be sharded.
        kernel: the attention kernel for whole sequences.
        ring_kernel: a kernel that also returns the log-sum-exp; needed if a ring of several ranks passes keys on.
        groups: this rank's groups.
        gather: whether to all-gather keys and values over the ring instead of passing them on.
        displaced: the stale keys and values, if those are used instead; from now on it counts the network's
            evaluations.
        state: the record of how the current tokens are sharded, filled here; None if nothing else reads it.

    Returns:
        The feature that gives every stack of the plan this rank's tokens.
    """
    state = SequenceState() if state is None else state
    state.index = groups.tokens.index

    def make_attention() -> SequenceAttention:
        return SequenceAttention(
            kernel, ring_kernel, groups.ulysses, groups.ring, groups.tokens, state, gather, displaced
        )

    if displaced is not None:
        displaced.count_evaluations_of(network)
    for stack in plan.stacks:
        for name, module in block_stack(network, stack).named_modules():
            if "kernel" in vars(module):
                local = any(fnmatch(f"{stack.blocks}.{name}", pattern) for pattern in plan.local_attention)
                module.kernel = kernel if local else make_attention()
    return TokenSharding(groups.tokens, state)


@dataclass(frozen=True)
class TokenSharding:
    """Runs every stack of blocks on this rank's tokens (models.blocks.RunnerFeature).

    Args:
        tokens: the ranks that share tokens.
        state: the record of how the current tokens are sharded, filled here.
    """

    tokens: Group
    state: SequenceState

    def wrap(self, stack: Stack, inner: Runner) -> Runner:
        """Return a runner that shards the arguments of a stack, and gathers its streams."""
        return _ShardedRunner(stack, self.tokens, self.state, inner)


class _ShardedRunner:
    """Shards the arguments of a stack of blocks, runs it, and gathers its streams."""

    def __init__(self, stack: Stack, tokens: Group, state: SequenceState, inner: Runner) -> None:
        self.streams = stack.streams
        self.sharded = stack.sharded
        self.tokens = tokens
        self.state = state
        self.inner = inner

    def __call__(self, blocks: Sequence[nn.Module], streams: Streams, shared: Shared) -> Streams:
        lengths = {name: streams[name].shape[self.sharded[name]] for name in self.streams}
        self.state.layout = TokenLayout(tuple(lengths.values()), self.tokens.size)
        local = self.inner(
            blocks,
            {name: shard(x, self.sharded[name], self.tokens) for name, x in streams.items()},
            {name: self._shard_shared(name, x) for name, x in shared.items()},
        )
        self.state.layout = None
        return {name: unshard(x, self.sharded[name], lengths[name], self.tokens) for name, x in local.items()}

    def _shard_shared(self, name: str, x: Tensor | None) -> Tensor | None:
        return x if x is None or name not in self.sharded else shard(x, self.sharded[name], self.tokens)


def shard(x: Tensor, dim: int, group: Group) -> Tensor:
    """Return this rank's part of a tensor along `dim`, padded with zeros if the last rank has fewer."""
    size = -(-x.shape[dim] // group.size)
    start = min(group.index * size, x.shape[dim])
    local = x.narrow(dim, start, min(size, x.shape[dim] - start))
    spare = size - local.shape[dim]
    if spare == 0:
        return local
    return torch.cat([local, local.new_zeros([spare if d == dim else n for d, n in enumerate(x.shape)])], dim=dim)


def unshard(x: Tensor, dim: int, length: int, group: Group) -> Tensor:
    """Gather the whole tensor from every rank's part, without padding."""
    dim = dim % x.ndim
    return group.all_gather(x).movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, length)


def shard_range(size: int, group: Group) -> tuple[int, int]:
    """Return the indices of this rank among `size`, as the first one and one past the last."""
    each = -(-size // group.size)
    first = min(group.index * each, size)
    return first, min(first + each, size)


class ColumnParallelLinear(nn.Module):
    """This rank's slice of the output features of a linear.

    Args:
        linear: the whole linear.
        group: the ranks that share it.
    """

    def __init__(self, linear: nn.Linear, group: Group) -> None:
        super().__init__()
        out = TensorSlice(0, linear.out_features, (shard_range(linear.out_features, group),))
        self.slices = {"weight": out} if linear.bias is None else {"weight": out, "bias": out}
        self.weight = nn.Parameter(out.of(linear.weight), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(out.of(linear.bias), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute this rank's output features."""
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """This rank's slice of the input features of a linear; outputs are summed over ranks, and the bias is added once.

    Args:
        linear: the whole linear.
        group: the ranks that share it.
        segments: widths of inputs that are sharded one by one, if the input joins several of them.
    """

    def __init__(self, linear: nn.Linear, group: Group, segments: tuple[int, ...] | None = None) -> None:
        super().__init__()
        widths = segments or (linear.in_features,)
        starts = accumulate(widths, initial=0)
        runs = tuple(
            (at + a, at + b) for at, (a, b) in zip(starts, (shard_range(w, group) for w in widths), strict=False)
        )
        self.slices = {"weight": TensorSlice(1, linear.in_features, runs)}
        self.weight = nn.Parameter(self.slices["weight"].of(linear.weight), requires_grad=False)
        self.bias = linear.bias
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Compute the whole output from this rank's input features."""
        summed = self.group.all_reduce(self.partial_product(x))
        return summed if self.bias is None else summed + self.bias

    def partial_product(self, x: Tensor) -> Tensor:
        """Return this rank's term of the sum."""
        return F.linear(x, self.weight)


class ShardedRMSNorm(nn.Module):
    """This rank's channels of an RMS norm over a whole width; the mean square is over all ranks' channels.

    Args:
        norm: the whole norm.
        group: the ranks that share it.
    """

    def __init__(self, norm: nn.RMSNorm, group: Group) -> None:
        super().__init__()
        self.width = norm.weight.shape[0]
        self.slices = {"weight": TensorSlice(0, self.width, (shard_range(self.width, group),))}
        self.weight = nn.Parameter(self.slices["weight"].of(norm.weight), requires_grad=False)
        self.eps = norm.eps if norm.eps is not None else torch.finfo(norm.weight.dtype).eps
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Normalize this rank's channels."""
        square = self.group.all_reduce(x.float().square().sum(-1, keepdim=True)) / self.width
        return (x.float() * (square + self.eps).rsqrt() * self.weight.float()).type_as(x)


def shard_linears(network: nn.Module, plan: ParallelPlan, group: Group) -> dict[str, TensorSlice]:
    """Apply tensor parallelism in place: linears and norms of the plan keep this rank's slice.

    Args:
        network: the network, written for one device.
        plan: how the network can be sharded.
        group: the ranks that share the linears.

    Returns:
        For each sharded parameter, the slice of the whole one that it now is. If the network was sharded before its
            weights
        were loaded, it says what to read from a checkpoint.
    """
    parts: dict[str, TensorSlice] = {}
    if group.size == 1:
        return parts
    for name, module in list(network.named_modules()):
        if (sharded_module := _shard_module(name, module, plan, group)) is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(owner), leaf, sharded_module)
            parts |= {f"{name}.{parameter}": shard for parameter, shard in sharded_module.slices.items()}
    return parts


def _shard_module(
    name: str, module: nn.Module, plan: ParallelPlan, group: Group
) -> ColumnParallelLinear | RowParallelLinear | ShardedRMSNorm | None:
    """Return this rank's slice of a module that the plan names; None for any other module."""

    def named(patterns: Iterable[str]) -> str | None:
        return next((pattern for pattern in patterns if fnmatch(name, pattern)), None)

    if isinstance(module, nn.RMSNorm):
        return ShardedRMSNorm(module, group) if named(plan.head_norms) else None
    if not isinstance(module, nn.Linear):
        return None
    if named(plan.column):
        return ColumnParallelLinear(module, group)
    if pattern := named(plan.joined_rows):
        shares = plan.joined_rows[pattern]
        return RowParallelLinear(module, group, tuple(module.in_features * share // sum(shares) for share in shares))
    return RowParallelLinear(module, group) if named(plan.row) else None
