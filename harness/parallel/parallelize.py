"""Applies a layout to a network from outside, by the plan its folder states: tokens dealt, linears cut.

The network stays as it was written for one device. Its attention kernel is replaced by one over dealt tokens, hooks on
its blocks deal their arguments and gather what the last one returns, and linears are swapped for their slices.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from fnmatch import fnmatch
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.parallel.attention import SequenceAttention, SequenceState, TokenLayout
from harness.parallel.displaced import DisplacedPatches
from harness.parallel.group import Group
from harness.parallel.process_groups import ProcessGroups
from models.attention import AttentionKernel
from models.attention.lse import LseKernel
from models.parts import Part
from models.plan import ParallelPlan, Stack


def shard_tokens(
    network: nn.Module,
    plan: ParallelPlan,
    kernel: AttentionKernel,
    ring_kernel: LseKernel | None,
    groups: ProcessGroups,
    gather: bool = False,
    displaced: DisplacedPatches | None = None,
    state: SequenceState | None = None,
) -> None:
    """Sequence parallelism in place: every stack of the plan works on this rank's part of its tokens.

    Args:
        network: written for one device.
        plan: of its folder.
        kernel: the attention of whole heads.
        ring_kernel: the same with log-sum-exp, where keys and values are passed on over a ring of more than one rank.
        axes: this rank's groups.
        gather: all-gather keys and values over the ring in place of passing them on.
        displaced: or meet those of the evaluation before; counts the network's evaluations from now on.
        state: where it is told how the tokens at hand are dealt; None where nobody else reads it.
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
        blocks = network.get_submodule(stack.blocks)
        assert isinstance(blocks, nn.ModuleList)
        for name, module in blocks.named_modules():
            if "kernel" in vars(module):
                local = any(fnmatch(f"{stack.blocks}.{name}", pattern) for pattern in plan.local_attention)
                module.kernel = kernel if local else make_attention()
        _TokenSharder(stack, blocks, groups.tokens, state).install()


class _TokenSharder:
    """Deals the arguments of a run of blocks, and gathers what its last block returns."""

    def __init__(self, stack: Stack, blocks: nn.ModuleList, tokens: Group, state: SequenceState) -> None:
        self.stack = stack
        self.blocks = blocks
        self.tokens = tokens
        self.state = state
        self.signature = inspect.signature(blocks[0].forward)

    def install(self) -> None:
        """Hooks every block."""
        for number, block in enumerate(self.blocks):
            block.register_forward_pre_hook(self._shard_first if number == 0 else self._shard_later, with_kwargs=True)
        self.blocks[len(self.blocks) - 1].register_forward_hook(self._gather)

    def _shard_first(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        streams = [bound.arguments[name] for name in self.stack.streams]
        lengths = tuple(x.shape[self.stack.sharded[n]] for n, x in zip(self.stack.streams, streams, strict=True))
        self.state.layout = TokenLayout(lengths, self.tokens.size)
        return self._shard_arguments(bound, self.stack.sharded)

    def _shard_later(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        return self._shard_arguments(bound, [name for name in self.stack.sharded if name not in self.stack.outputs])

    def _shard_arguments(self, bound: inspect.BoundArguments, names: Iterable[str]) -> Any:
        for name in names:
            if bound.arguments.get(name) is not None:
                bound.arguments[name] = shard(bound.arguments[name], self.stack.sharded[name], self.tokens)
        return bound.args, bound.kwargs

    def _gather(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        layout, self.state.layout = self.state.layout, None
        assert layout is not None
        lengths = dict(zip(self.stack.streams, layout.lengths, strict=True))
        outputs = output if isinstance(output, tuple) else (output,)
        joined = tuple(
            None if x is None else unshard(x, self.stack.sharded[name], lengths[name], self.tokens)
            for name, x in zip(self.stack.outputs, outputs, strict=True)
        )
        return joined if isinstance(output, tuple) else joined[0]


def shard(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part of a tensor along `dim`, zeros where the last rank has none."""
    size = -(-x.shape[dim] // group.size)
    start = min(group.index * size, x.shape[dim])
    local = x.narrow(dim, start, min(size, x.shape[dim] - start))
    spare = size - local.shape[dim]
    if spare == 0:
        return local
    return torch.cat([local, local.new_zeros([spare if d == dim else n for d, n in enumerate(x.shape)])], dim=dim)


def unshard(x: Tensor, dim: int, length: int, group: Group) -> Tensor:
    """The whole tensor from every rank's part, padding cut off."""
    dim = dim % x.ndim
    return group.all_gather(x).movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, length)


def shard_range(size: int, group: Group) -> tuple[int, int]:
    """(first, behind the last) of this rank's indices of `size`."""
    each = -(-size // group.size)
    first = min(group.index * each, size)
    return first, min(first + each, size)


class ColumnParallelLinear(nn.Module):
    """A linear's slice of output features."""

    def __init__(self, linear: nn.Linear, group: Group) -> None:
        super().__init__()
        out = Part(0, linear.out_features, (shard_range(linear.out_features, group),))
        self.slices = {"weight": out} if linear.bias is None else {"weight": out, "bias": out}
        self.weight = nn.Parameter(out.of(linear.weight), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(out.of(linear.bias), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """A linear's slice of input features; outputs are summed over ranks, and the bias is added once."""

    def __init__(self, linear: nn.Linear, group: Group, segments: tuple[int, ...] | None = None) -> None:
        super().__init__()
        widths = segments or (linear.in_features,)
        starts = accumulate(widths, initial=0)
        runs = tuple(
            (at + a, at + b) for at, (a, b) in zip(starts, (shard_range(w, group) for w in widths), strict=False)
        )
        self.slices = {"weight": Part(1, linear.in_features, runs)}
        self.weight = nn.Parameter(self.slices["weight"].of(linear.weight), requires_grad=False)
        self.bias = linear.bias
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        summed = self.group.all_reduce(self.partial_product(x))
        return summed if self.bias is None else summed + self.bias

    def partial_product(self, x: Tensor) -> Tensor:
        """This rank's summand."""
        return F.linear(x, self.weight)


class ShardedRMSNorm(nn.Module):
    """This rank's channels of an RMS norm over a whole width; the mean square is that of all ranks' channels."""

    def __init__(self, norm: nn.RMSNorm, group: Group) -> None:
        super().__init__()
        self.width = norm.weight.shape[0]
        self.slices = {"weight": Part(0, self.width, (shard_range(self.width, group),))}
        self.weight = nn.Parameter(self.slices["weight"].of(norm.weight), requires_grad=False)
        self.eps = norm.eps if norm.eps is not None else torch.finfo(norm.weight.dtype).eps
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        square = self.group.all_reduce(x.float().square().sum(-1, keepdim=True)) / self.width
        return (x.float() * (square + self.eps).rsqrt() * self.weight.float()).type_as(x)


def shard_linears(network: nn.Module, plan: ParallelPlan, group: Group) -> dict[str, Part]:
    """Tensor parallelism in place: linears and norms of the plan keep this rank's slice.

    Returns:
        By parameter, which part it now is of the whole one: what is to be read of a checkpoint where the network was
        cut before it was filled.
    """
    parts: dict[str, Part] = {}
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
    """This rank's slice of a module that the plan names, None for any other."""

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
