"""How many bytes a rank sends in one evaluation of a network, by kind of collective, from shapes alone.

A network as it was written for one device is traced on the meta device: it computes shapes and no numbers. What it told
then decides what every layout sends. With T = ring x ulysses ranks that share tokens,

    l = B sum_i ceil(L_i / T)       tokens a rank holds of streams of L_i tokens in a batch of B, padding included
    a = ulysses ceil(A / (tp ulysses))      heads it computes of A, padding included
    x = l a E s                     bytes of its queries, of its keys and of its values: E channels a head of s bytes

it sends (harness.parallel.group says what each collective of N ranks costs)

    for every attention
        all_to_all      4 x (ulysses - 1) / ulysses     queries, keys and values to whole sequences, and outputs back:
                                                        x is as large there, more tokens of as many times fewer heads
        shift           2 x (ring - 1)                  keys and values, at every turn of the ring but the last
        or all_gather   2 x (ring - 1)                  the same bytes where they are gathered at once
        or all_gather displaced                         or where those of the evaluation before are met
        all_gather      l (T - 1)                       its key mask, a byte a token, where that is dealt like tokens
    for every output of a stack of blocks, of C channels
        all_gather      l C s (T - 1)
    for every linear that is cut by its inputs, of C outputs
        all_reduce      2 l C s (tp - 1) / tp
    for every norm over a width that is cut
        all_reduce      2 l 4 (tp - 1) / tp             a sum of squares a token, in float32
    for every block of a stack whose weights are dealt over S = cfg x ring x ulysses ranks, and once for those outside
        all_gather weights      (S - 1) sum_p ceil(n_p / S) m_p s_p     of parameters of n_p rows of m_p numbers
    for an output of n numbers, in float32, where the branches of guidance are apart
        all_gather      4 n (cfg - 1)

and in a pipeline of N ranks (harness.parallel.pipefusion), over all of its patches,

        send            L C s       for every output of a stack of blocks; the last rank those of the last stack not
        broadcast       n s (N - 1) for an output of n numbers; the last rank alone

What every rank computes is in harness.costs.flops, what it holds in formula_memory, from the same trace.
Outside of stacks, and for tokens that every rank holds whole (the text of a cross-attention), l counts all tokens.
Attention to such tokens sends nothing. Data parallelism sends nothing.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.device.flops import counted
from harness.parallel.attention import TokenLayout
from models.components import Conditioning
from models.empty import build_empty
from models.plan import ParallelPlan, Stack

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class TokenStreams:
    """What an operation works on: streams of tokens in a batch.

    Args:
        batch: B.
        lengths: L_i, of each stream.
        dealt: whether each is cut over ranks.
    """

    batch: int
    lengths: tuple[int, ...]
    sharded: bool = True

    def per_rank(self, ranks: int) -> int:
        """Tokens of the whole batch on one of so many ranks: l."""
        return self.batch * sum(TokenLayout(self.lengths, ranks if self.sharded else 1).parts)


@dataclass(frozen=True)
class ShardedAttention:
    """One attention of tokens to themselves.

    Args:
        tokens: of all streams that it joins.
        heads: A, of the whole network.
        channels: E, a head.
        sharded_mask: its key mask is cut over ranks like the tokens.
    """

    tokens: TokenStreams
    heads: int
    channels: int
    sharded_mask: bool


@dataclass(frozen=True)
class LinearCall:
    """One call of a linear.

    Args:
        tokens: that it works on.
        inputs: features in, of the whole network.
        outputs: features out.
        cut: by which of the two it is cut over ranks; None where every rank has it whole.
    """

    tokens: TokenStreams
    inputs: int
    outputs: int
    cut: Literal["inputs", "outputs"] | None


@dataclass(frozen=True)
class LocalAttention:
    """One attention whose keys every rank holds whole.

    Args:
        queries: its tokens.
        keys: how many a sample.
        heads: A, of the whole network.
        channels: E, a head.
    """

    queries: TokenStreams
    keys: int
    heads: int
    channels: int


@dataclass(frozen=True)
class NetworkTrace:
    """What one evaluation of a network does that a layout divides or sends bytes for.

    Args:
        batch: B, of the evaluation.
        attention: calls whose tokens are dealt.
        outputs: of every stack of blocks: tokens and channels.
        rows: of every linear that is cut by its inputs: tokens and output channels.
        norms: of every norm over a width that is cut: tokens.
        numbers: n, of the network's output.
        linears: all of them.
        local_attention: all other calls of the attention kernel.
        other_flops: operations that are neither; every rank does them.
        widest: numbers that the layer outside of stacks with the largest input and output has of both.
    """

    batch: int
    attention: tuple[ShardedAttention, ...]
    outputs: tuple[tuple[TokenStreams, int], ...]
    row_linears: tuple[tuple[TokenStreams, int], ...]
    sharded_norms: tuple[TokenStreams, ...]
    output_elements: int
    linears: tuple[LinearCall, ...]
    local_attention: tuple[LocalAttention, ...]
    other_flops: int
    widest: int


def sent_bytes(
    trace: NetworkTrace, degrees: tuple[int, ...], itemsize: int, gather: bool = False, displaced: bool = False
) -> dict[str, int]:
    """Bytes that each rank of a layout sends in one evaluation, by kind of collective, without kinds that send none.

    Args:
        trace: of the network, for the batch that one rank evaluates (with branches apart, that of one branch).
        degrees: of dp, cfg, tp, ring and ulysses (harness.parallel.mesh.AXES).
        item: s, bytes of a number of the network's dtype.
        gather: the ring gathers keys and values at once.
        displaced: the ring meets those of the evaluation before.
    """
    _, cfg, tp, ring, ulysses = degrees
    shared, sent = ring * ulysses, Counter[str]()
    around = "all_gather displaced" if displaced else "all_gather" if gather else "shift"
    for call in trace.attention:
        tokens, heads = call.tokens.per_rank(shared), -(-(call.heads // tp) // ulysses) * ulysses
        part = tokens * heads * call.channels * itemsize
        sent["all_to_all"] += 4 * part * (ulysses - 1) // ulysses
        sent[around] += 2 * part * (ring - 1)
        sent["all_gather"] += tokens * (shared - 1) * call.sharded_mask
    for output, channels in trace.outputs:
        sent["all_gather"] += output.per_rank(shared) * channels * itemsize * (shared - 1)
    for row, channels in trace.row_linears:
        sent["all_reduce"] += 2 * row.per_rank(shared) * channels * itemsize * (tp - 1) // tp
    for norm in trace.sharded_norms:
        sent["all_reduce"] += 2 * norm.per_rank(shared) * FLOAT32 * (tp - 1) // tp
    sent["all_gather"] += FLOAT32 * trace.output_elements * (cfg - 1)
    return {kind: count for kind, count in sent.items() if count}


def pipe_bytes(trace: NetworkTrace, plan: ParallelPlan, ranks: int, index: int, itemsize: int) -> dict[str, int]:
    """Bytes that one rank of a pipeline sends in one evaluation, by kind of collective, without kinds that send none.

    Args:
        trace: of the network, for the batch that one rank evaluates.
        plan: of its folder.
        ranks: N.
        index: of the rank in the pipeline.
        item: s, bytes of a number of the network's dtype.
    """
    sizes = [tokens.per_rank(1) * channels * itemsize for tokens, channels in trace.outputs]
    if index < ranks - 1:
        return {"send": sum(sizes)}
    sent = {
        "send": sum(sizes[: -len(plan.stacks[-1].outputs)]),
        "broadcast": trace.output_elements * itemsize * (ranks - 1),
    }
    return {kind: count for kind, count in sent.items() if count}


def weight_bytes(network: nn.Module, plan: ParallelPlan, ranks: int) -> int:
    """Bytes that a rank sends in one evaluation to gather dealt weights (harness.parallel.shard).

    Args:
        network: in its dtypes and cut as a rank has it, on any device (meta is enough).
        plan: of its folder.
        ranks: S.
    """
    kept = {parameter for name in plan.called_outside for parameter in network.get_submodule(name).parameters()}
    sharded = [p for p in network.parameters() if p not in kept]
    parts = (-(-len(p) // ranks) * p[0].numel() * p.element_size() for p in sharded)
    return (ranks - 1) * sum(parts)


def trace_network(
    make: Callable[[], nn.Module], plan: ParallelPlan, inputs: tuple[Tensor, Tensor, Conditioning]
) -> NetworkTrace:
    """Runs a network once without any numbers.

    Args:
        make: builds the network, for one device.
        plan: of its folder.
        inputs: latent, tau_B and conditioning of the sizes in question, on any device (meta is enough).
    """
    network = build_empty(make, torch.float32, "meta")
    tracer = _NetworkTracer(plan)
    tracer.register_hooks(network)
    latent, tau_B, condition = inputs
    told = {f.name: getattr(condition, f.name) for f in fields(Conditioning)}
    there = Conditioning(**{name: None if x is None else x.to("meta") for name, x in told.items()})
    flops: list[int] = []
    with torch.no_grad(), counted(flops.append):
        output: Tensor = network(latent.to("meta"), tau_B.to("meta"), there)
    linears = sum(2 * call.tokens.per_rank(1) * call.inputs * call.outputs for call in tracer.linears)
    return NetworkTrace(
        len(latent),
        tuple(tracer.attention),
        tuple(tracer.outputs),
        tuple(tracer.row_linears),
        tuple(tracer.sharded_norms),
        output.numel(),
        tuple(tracer.linears),
        tuple(tracer.local_attention),
        flops[0] - linears,
        tracer.widest,
    )


class _NetworkTracer:
    """Listens to a network by hooks, and stands in for the attention whose tokens are dealt."""

    def __init__(self, plan: ParallelPlan) -> None:
        self.plan = plan
        self.attention: list[ShardedAttention] = []
        self.outputs: list[tuple[TokenStreams, int]] = []
        self.row_linears: list[tuple[TokenStreams, int]] = []
        self.sharded_norms: list[TokenStreams] = []
        self.linears: list[LinearCall] = []
        self.local_attention: list[LocalAttention] = []
        self.widest = 0
        self._lengths: tuple[int, ...] = ()  # of the streams of the block that runs now
        self._dealt_mask = False
        self._replicated: list[Tensor] = []  # what every rank holds whole in that block

    def register_hooks(self, network: nn.Module) -> None:
        """Hooks it."""
        for module in network.modules():
            if "kernel" in (own := vars(module)):
                own["kernel"] = self._attend_locally
        for stack in self.plan.stacks:
            blocks = network.get_submodule(stack.blocks)
            assert isinstance(blocks, nn.ModuleList)
            for name, module in blocks.named_modules():
                if "kernel" in vars(module) and not _named(f"{stack.blocks}.{name}", self.plan.local_attention):
                    module.kernel = self._attend
            for block in blocks:
                block.register_forward_pre_hook(partial(self._enter, stack), with_kwargs=True)
            blocks[len(blocks) - 1].register_forward_hook(partial(self._leave, stack))
        for name, module in network.named_modules():
            if isinstance(module, nn.RMSNorm) and _named(name, self.plan.head_norms):
                module.register_forward_hook(self._norm)
            elif isinstance(module, nn.Linear):
                module.register_forward_hook(partial(self._linear, self._cut(name)))
            if not list(module.children()):
                module.register_forward_hook(self._track_replicated)

    def _cut(self, name: str) -> Literal["inputs", "outputs"] | None:
        if _named(name, self.plan.column):
            return "outputs"
        return "inputs" if _named(name, (*self.plan.row, *self.plan.joined_rows)) else None

    def _enter(self, stack: Stack, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        self._lengths = tuple(given[name].shape[stack.sharded[name]] for name in stack.streams)
        sharded = [given[name] for name in stack.sharded if given.get(name) is not None]
        self._dealt_mask = any(x.dtype is torch.bool for x in sharded)
        self._replicated = [given[name] for name in stack.replicated]

    def _leave(self, stack: Stack, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        lengths = dict(zip(stack.streams, self._lengths, strict=True))
        for name, x in zip(stack.outputs, output if isinstance(output, tuple) else (output,), strict=True):
            if x is not None:
                self.outputs.append((TokenStreams(len(x), (lengths[name],)), x.shape[-1]))
        self._lengths, self._replicated = (), []

    def _attend(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        joined = TokenLayout(self._lengths, 1).of(k_BSHD.shape[1])
        batch, _, heads, channels = q_BLHD.shape
        sharded_mask = mask_BS is not None and self._dealt_mask
        self.attention.append(ShardedAttention(TokenStreams(batch, joined.lengths), heads, channels, sharded_mask))
        return torch.empty_like(q_BLHD)

    def _attend_locally(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        _, _, heads, channels = q_BLHD.shape
        queries = self._tokens(q_BLHD.flatten(2))
        self.local_attention.append(LocalAttention(queries, k_BSHD.shape[1], heads, channels))
        return torch.empty_like(q_BLHD)

    def _linear(
        self, cut: Literal["inputs", "outputs"] | None, linear: nn.Linear, args: tuple[Tensor, ...], output: Tensor
    ) -> None:
        tokens = self._tokens(args[0])
        self.linears.append(LinearCall(tokens, linear.in_features, linear.out_features, cut))
        if cut == "inputs":
            self.row_linears.append((tokens, linear.out_features))

    def _norm(self, norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.sharded_norms.append(self._tokens(args[0]))

    def _tokens(self, x: Tensor) -> TokenStreams:
        """Of what a layer is given, (B, n, C): the streams of the block it is in, or what every rank holds whole."""
        batch, count = len(x), x[0, ..., 0].numel()
        if not self._is_replicated(x) and count in (sum(self._lengths), *self._lengths):
            return TokenStreams(batch, TokenLayout(self._lengths, 1).of(count).lengths)
        return TokenStreams(batch, (count,), sharded=False)

    def _track_replicated(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """What a layer makes of something that every rank holds whole is held whole too."""
        if args and self._is_replicated(args[0]):
            self._replicated.append(output)
        if not self._lengths and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self.widest = max(self.widest, args[0].numel() + output.numel())

    def _is_replicated(self, x: Tensor) -> bool:
        return any(x is held for held in self._replicated)


def _named(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
