"""Bytes that a rank sends in one evaluation of a network, by kind of collective, from shapes alone.

The single-device network is traced on the meta device, which computes shapes and no data. The trace then decides what
every layout sends. With T = ring x ulysses ranks that share tokens,

    l = B sum_i ceil(L_i / T)       tokens on a rank, of streams of L_i tokens in a batch of B, padding included
    a = ulysses ceil(A / (tp ulysses))      heads that it computes, of A, padding included
    x = l a E s                     bytes of its queries, of its keys and of its values: E channels per head, s bytes

it sends (harness.parallel.group has the cost of each collective of N ranks)

    for every attention
        all_to_all      4 x (ulysses - 1) / ulysses     queries, keys and values to whole sequences, and outputs back:
                                                        x has the same size there, with more tokens and fewer heads
        shift           2 x (ring - 1)                  keys and values, at every step of the ring but the last
        or all_gather   2 x (ring - 1)                  the same bytes if they are gathered at once
        or all_gather displaced                         or if those of the previous evaluation are used
        all_gather      l (T - 1)                       its key mask, one byte per token, if it is sharded like tokens
    for every output of a stack of blocks, of C channels
        all_gather      l C s (T - 1)
    for every linear that is sharded by its inputs, of C outputs
        all_reduce      2 l C s (tp - 1) / tp
    for every norm over a sharded width
        all_reduce      2 l 4 (tp - 1) / tp             a sum of squares per token, in float32
    for every block of a stack whose weights are sharded over S = cfg x ring x ulysses ranks, and once for the others
        all_gather weights      (S - 1) sum_p ceil(n_p / S) m_p s_p     of parameters with n_p rows of m_p elements
    for an output of n elements, in float32, if the branches of guidance are on different ranks
        all_gather      4 n (cfg - 1)

and in a pipeline of N ranks (harness.parallel.pipefusion), over all of its patches,

        send            L C s       for every output of a stack of blocks; not those of the last stack on the last rank
        broadcast       n s (N - 1) for an output of n elements; the last rank alone

harness.costs.flops counts what every rank computes, and harness.costs.memory what it holds, from the same trace.
Outside of stacks, and for replicated tokens (the text of a cross-attention), l counts all tokens. Attention to such
tokens sends nothing. Data parallelism sends nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.device.flops import count_operations
from harness.parallel.attention import TokenLayout
from harness.parallel.fsdp import fsdp_units
from models.blocks import Runner, Shared, Streams, block_stack, wrap_runners
from models.components import Conditioning
from models.meta_init import build_empty
from models.plan import ParallelPlan, Stack

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class TokenStreams:
    """The tokens that an operation works on: streams of tokens in a batch.

    Args:
        batch: B, the batch size.
        lengths: L_i, the tokens of each stream.
        sharded: whether each stream is sharded over ranks.
    """

    batch: int
    lengths: tuple[int, ...]
    sharded: bool = True

    def per_rank(self, ranks: int) -> int:
        """Return l, the tokens of the whole batch on each of `ranks` ranks."""
        return self.batch * sum(TokenLayout(self.lengths, ranks if self.sharded else 1).local_lengths)


@dataclass(frozen=True)
class ShardedAttention:
    """One self-attention over sharded tokens.

    Args:
        tokens: the tokens of all streams that it joins.
        heads: A, the heads of the whole network.
        channels: E, the channels per head.
        sharded_mask: whether its key mask is sharded over ranks like the tokens.
    """

    tokens: TokenStreams
    heads: int
    channels: int
    sharded_mask: bool


@dataclass(frozen=True)
class LinearCall:
    """One call of a linear.

    Args:
        tokens: the tokens of its input.
        inputs: the input features of the whole network.
        outputs: the output features.
        sharded_dim: the features that are sharded over ranks; None if every rank has the whole linear.
    """

    tokens: TokenStreams
    inputs: int
    outputs: int
    sharded_dim: Literal["inputs", "outputs"] | None


@dataclass(frozen=True)
class LocalAttention:
    """One attention whose keys are replicated on every rank.

    Args:
        queries: the query tokens.
        keys: the keys per sample.
        heads: A, the heads of the whole network.
        channels: E, the channels per head.
    """

    queries: TokenStreams
    keys: int
    heads: int
    channels: int


@dataclass(frozen=True)
class GatheredWeights:
    """The parameters that ranks gather if they share a network's weights.

    Args:
        parameters: n_p, m_p s_p and the dimension that tensor parallelism shards (0, 1 or None) of each parameter.
        calls: the number of collectives in one evaluation.
    """

    parameters: tuple[tuple[int, int, Literal[0, 1] | None], ...]
    calls: int


@dataclass(frozen=True)
class NetworkTrace:
    """The operations of one evaluation of a network that a layout shards or that make ranks communicate.

    Args:
        batch: B, the batch size of the evaluation.
        attention: the attention calls over sharded tokens.
        outputs: the tokens and channels of every output of a stack of blocks.
        row_linears: the tokens and output channels of every linear sharded by its inputs.
        sharded_norms: the tokens of every norm over a sharded width.
        output_elements: n, the elements of the network's output.
        linears: all calls of linears.
        local_attention: all other calls of the attention kernel.
        other_flops: all other operations, which every rank computes.
        widest: the largest number of input and output elements of a layer outside of stacks.
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
    """Return the bytes that each rank sends in one evaluation, by kind of collective, without kinds that send none.

    Args:
        trace: the network's trace for the batch that one rank evaluates (one branch if cfg = 2).
        degrees: the degrees of dp, cfg, tp, ring and ulysses (harness.parallel.mesh.AXES).
        itemsize: s, the bytes per element of the network's dtype.
        gather: whether the ring gathers keys and values at once.
        displaced: whether the ring uses keys and values of the previous evaluation.
    """
    _, cfg, tp, ring, ulysses = degrees
    sp, sent = ring * ulysses, Counter[str]()
    ring_kind = "all_gather displaced" if displaced else "all_gather" if gather else "shift"
    for call in trace.attention:
        tokens, heads = call.tokens.per_rank(sp), -(-(call.heads // tp) // ulysses) * ulysses
        part = tokens * heads * call.channels * itemsize
        sent["all_to_all"] += 4 * part * (ulysses - 1) // ulysses
        sent[ring_kind] += 2 * part * (ring - 1)
        sent["all_gather"] += tokens * (sp - 1) * call.sharded_mask
    for output, channels in trace.outputs:
        sent["all_gather"] += output.per_rank(sp) * channels * itemsize * (sp - 1)
    for row, channels in trace.row_linears:
        sent["all_reduce"] += 2 * row.per_rank(sp) * channels * itemsize * (tp - 1) // tp
    for norm in trace.sharded_norms:
        sent["all_reduce"] += 2 * norm.per_rank(sp) * FLOAT32 * (tp - 1) // tp
    sent["all_gather"] += FLOAT32 * trace.output_elements * (cfg - 1)
    return {kind: count for kind, count in sent.items() if count}


def pipe_bytes(trace: NetworkTrace, plan: ParallelPlan, ranks: int, index: int, itemsize: int) -> dict[str, int]:
    """Return the bytes that one rank of a pipeline sends in one evaluation, by kind of collective.

    Kinds that send nothing are left out.

    Args:
        trace: the network's trace for the batch that one rank evaluates.
        plan: the parallel plan of the network's family.
        ranks: N, the ranks of the pipeline.
        index: the rank's index in the pipeline.
        itemsize: s, the bytes per element of the network's dtype.
    """
    sizes = [tokens.per_rank(1) * channels * itemsize for tokens, channels in trace.outputs]
    if index < ranks - 1:
        return {"send": sum(sizes)}
    sent = {
        "send": sum(sizes[: -len(plan.stacks[-1].outputs)]),
        "broadcast": trace.output_elements * itemsize * (ranks - 1),
    }
    return {kind: count for kind, count in sent.items() if count}


def weight_bytes(weights: GatheredWeights, ranks: int, tp: int = 1) -> int:
    """Return the bytes that a rank sends in one evaluation to gather sharded weights (harness.parallel.fsdp).

    Args:
        weights: the parameters that are gathered.
        ranks: S, the ranks that share the weights.
        tp: the degree of tensor parallelism, which is applied first.
    """
    parts = 0
    for rows, row_bytes, dim in weights.parameters:
        parts += -(-(rows // (tp if dim == 0 else 1)) // ranks) * (row_bytes // (tp if dim == 1 else 1))
    return (ranks - 1) * parts


def gathered_weights(network: nn.Module, plan: ParallelPlan) -> GatheredWeights:
    """Return the parameters that ranks gather if they share the weights of a network.

    Args:
        network: the single-device network in its dtypes, on any device (meta is enough).
        plan: the parallel plan of the network's family.
    """
    unsharded = {parameter for name in plan.called_outside for parameter in network.get_submodule(name).parameters()}
    parameters = tuple(
        (len(p), p[0].numel() * p.element_size(), sharded_dim(network, name, plan))
        for name, p in network.named_parameters()
        if p not in unsharded
    )
    return GatheredWeights(parameters, sum(1 for _ in fsdp_units(network, plan)))


def sharded_dim(network: nn.Module, parameter: str, plan: ParallelPlan) -> Literal[0, 1] | None:
    """Return the dimension of a parameter that harness.parallel.parallelize shards over tp; None if it shards none."""
    owner, _, key = parameter.rpartition(".")
    module = network.get_submodule(owner)
    if isinstance(module, nn.RMSNorm):
        return 0 if _named(owner, plan.head_norms) else None
    if not isinstance(module, nn.Linear):
        return None
    if _named(owner, plan.column):
        return 0
    return 1 if key == "weight" and _named(owner, (*plan.row, *plan.joined_rows)) else None


def trace_network(
    make: Callable[[], nn.Module], plan: ParallelPlan, inputs: tuple[Tensor, Tensor, Conditioning]
) -> NetworkTrace:
    """Run a network once on the meta device.

    Args:
        make: a function that builds the single-device network.
        plan: the parallel plan of the network's family.
        inputs: latent, tau_B and conditioning of the shapes in question, on any device (meta is enough).

    Returns:
        The trace.
    """
    network = build_empty(make, torch.float32, "meta")
    tracer = _NetworkTracer(plan)
    tracer.register_hooks(network)
    latent, tau_B, condition = inputs
    tensors = {f.name: getattr(condition, f.name) for f in fields(Conditioning)}
    meta_condition = Conditioning(**{name: None if x is None else x.to("meta") for name, x in tensors.items()})
    flops: list[int] = []
    with torch.no_grad(), count_operations(flops.append):
        output: Tensor = network(latent.to("meta"), tau_B.to("meta"), meta_condition)
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
    """Observes a network through hooks, and replaces the attention over sharded tokens."""

    def __init__(self, plan: ParallelPlan) -> None:
        self.plan = plan
        self.attention: list[ShardedAttention] = []
        self.outputs: list[tuple[TokenStreams, int]] = []
        self.row_linears: list[tuple[TokenStreams, int]] = []
        self.sharded_norms: list[TokenStreams] = []
        self.linears: list[LinearCall] = []
        self.local_attention: list[LocalAttention] = []
        self.widest = 0
        self._lengths: tuple[int, ...] = ()  # of the streams of the block that is running
        self._sharded_mask = False
        self._replicated: list[Tensor] = []  # tensors of that block that are replicated on every rank

    def register_hooks(self, network: nn.Module) -> None:
        """Register the hooks and replace the attention kernels."""
        for module in network.modules():
            if "kernel" in (attributes := vars(module)):
                attributes["kernel"] = self._attend_locally
        for stack in self.plan.stacks:
            for name, module in block_stack(network, stack).named_modules():
                if "kernel" in vars(module) and not _named(f"{stack.blocks}.{name}", self.plan.local_attention):
                    module.kernel = self._attend
        wrap_runners(network, self.plan, self)
        for name, module in network.named_modules():
            if isinstance(module, nn.RMSNorm) and _named(name, self.plan.head_norms):
                module.register_forward_hook(self._norm)
            elif isinstance(module, nn.Linear):
                module.register_forward_hook(partial(self._linear, self._sharded_dim(name)))
            if not list(module.children()):
                module.register_forward_hook(self._track_replicated)

    def _sharded_dim(self, name: str) -> Literal["inputs", "outputs"] | None:
        if _named(name, self.plan.column):
            return "outputs"
        return "inputs" if _named(name, (*self.plan.row, *self.plan.joined_rows)) else None

    def wrap(self, stack: Stack, inner: Runner) -> Runner:
        """Return a runner that notes the tokens of a stack (models.blocks.RunnerFeature)."""
        return partial(self._run_stack, stack, inner)

    def _run_stack(
        self, stack: Stack, inner: Runner, blocks: Sequence[nn.Module], streams: Streams, shared: Shared
    ) -> Streams:
        arguments = {**shared, **streams}
        lengths = {name: streams[name].shape[stack.sharded[name]] for name in stack.streams}
        self._lengths = tuple(lengths.values())
        self._sharded_mask = any(x is not None and x.dtype is torch.bool for x in map(arguments.get, stack.sharded))
        for block in blocks:
            self._replicated = [x for name in stack.replicated if (x := arguments[name]) is not None]
            streams = inner((block,), streams, shared)
        self.outputs += [(TokenStreams(len(x), (lengths[name],)), x.shape[-1]) for name, x in streams.items()]
        self._lengths, self._replicated = (), []
        return streams

    def _attend(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        joined = TokenLayout(self._lengths, 1).for_tokens(k_BSHD.shape[1])
        batch, _, heads, channels = q_BLHD.shape
        sharded_mask = mask_BS is not None and self._sharded_mask
        self.attention.append(ShardedAttention(TokenStreams(batch, joined.lengths), heads, channels, sharded_mask))
        return torch.empty_like(q_BLHD)

    def _attend_locally(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        _, _, heads, channels = q_BLHD.shape
        queries = self._tokens(q_BLHD.flatten(2))
        self.local_attention.append(LocalAttention(queries, k_BSHD.shape[1], heads, channels))
        return torch.empty_like(q_BLHD)

    def _linear(
        self,
        sharded_dim: Literal["inputs", "outputs"] | None,
        linear: nn.Linear,
        args: tuple[Tensor, ...],
        output: Tensor,
    ) -> None:
        tokens = self._tokens(args[0])
        self.linears.append(LinearCall(tokens, linear.in_features, linear.out_features, sharded_dim))
        if sharded_dim == "inputs":
            self.row_linears.append((tokens, linear.out_features))

    def _norm(self, norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.sharded_norms.append(self._tokens(args[0]))

    def _tokens(self, x: Tensor) -> TokenStreams:
        """Return the tokens of a layer's input (B, n, C): the streams of the current block, or replicated tokens."""
        batch, count = len(x), x[0, ..., 0].numel()
        if not self._is_replicated(x) and count in (sum(self._lengths), *self._lengths):
            return TokenStreams(batch, TokenLayout(self._lengths, 1).for_tokens(count).lengths)
        return TokenStreams(batch, (count,), sharded=False)

    def _track_replicated(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Mark a layer's output as replicated if its input is."""
        if args and self._is_replicated(args[0]):
            self._replicated.append(output)
        if not self._lengths and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self.widest = max(self.widest, args[0].numel() + output.numel())

    def _is_replicated(self, x: Tensor) -> bool:
        return any(x is replicated for replicated in self._replicated)


def _named(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
