"""PipeFusion: ranks hold consecutive blocks, and image patches go from rank to rank while others are computed.

In evaluation n the queries of patch m of M attend, in every block, to

    K_0^n ... K_m^n, K_(m+1)^(n-1) ... K_(M-1)^(n-1)

These are fresh keys and values of the patches that have passed, and those of the evaluation before for the rest. In the
first `warmup` evaluations the whole image goes through at once, which is exact. Ranks send activations, and nothing
else:

    rank i to i + 1         the outputs of its run of blocks, patch by patch, for every stack of blocks
    the last to the first   those of a stack that is not the last, because all ranks run the layers between the stacks
    the last to all         the network's output

Source: PipeFusion (Fang et al. 2024, arXiv:2405.14430). Unlike there, a solver here steps on whole states. So the
pipeline fills and drains in every evaluation, and N ranks take (M + N - 1) / (M N) of the time of one. Every stream
that attention joins, text too, is divided into patches as the network's plan says.

Shapes: B batch, l tokens of a patch, S of all patches, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from harness.parallel.group import Group
from harness.parallel.stale_kv import StaleKVCache
from models.attention import AttentionKernel
from models.blocks import Runner, Shared, Streams, block_stack
from models.plan import ParallelPlan, Stack
from models.tensor_slice import TensorSlice

Span = tuple[int, int]
"""The first index and one past the last."""


def split_evenly(length: int, parts: int) -> list[Span]:
    """Divide `length` items into `parts` runs, as even as they can be."""
    return [(length * part // parts, length * (part + 1) // parts) for part in range(parts)]


def drop_blocks(network: nn.Module, plan: ParallelPlan, group: Group) -> dict[str, TensorSlice]:
    """Keep this rank's run of blocks and what lies outside of blocks; empty all other parameters, in place.

    Args:
        network: the network, written for one device.
        plan: the network's stacks of blocks.
        group: the ranks, in the order of the blocks.

    Returns:
        For each parameter of a dropped block, an empty slice, as harness.parallel.parallelize.shard_linears returns it.
    """
    parts: dict[str, TensorSlice] = {}
    for stack in plan.stacks:
        blocks = network.get_submodule(stack.blocks)
        first, stop = split_evenly(len(list(blocks.children())), group.size)[group.index]
        for number, block in blocks.named_children():
            if not first <= int(number) < stop:
                parts |= _empty_parameters(block, f"{stack.blocks}.{number}", plan.called_outside)
    return parts


def _empty_parameters(block: nn.Module, path: str, called_outside: Sequence[str]) -> Iterator[tuple[str, TensorSlice]]:
    for prefix, module in block.named_modules(prefix=path):
        if any(f"{prefix}.".startswith(f"{outside}.") for outside in called_outside):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            part = TensorSlice(0, len(parameter), ((0, 0),))
            setattr(module, name, nn.Parameter(part.of(parameter), requires_grad=False))
            yield f"{prefix}.{name}", part


@dataclass(frozen=True)
class Patch:
    """Tokens that are computed at once.

    Args:
        lengths: the lengths of the whole streams that attention joins.
        spans: the span of this patch in each stream.
    """

    lengths: tuple[int, ...]
    spans: tuple[Span, ...]

    def for_tokens(self, local: int) -> Patch:
        """Return the patch of an attention call, which joins all streams or only has the last one, the image."""
        if local == sum(stop - first for first, stop in self.spans):
            return self
        return Patch(self.lengths[-1:], self.spans[-1:])

    def write(self, fresh_2BlHD: Tensor, cached_2BSHD: Tensor) -> None:
        """Write the patch's keys and values into those of all patches."""
        start = taken = 0
        for length, (first, stop) in zip(self.lengths, self.spans, strict=True):
            count = stop - first
            cached_2BSHD[:, :, start + first : start + stop] = fresh_2BlHD[:, :, taken : taken + count]
            start, taken = start + length, taken + count


class PipeFusion(StaleKVCache):
    """One rank's position in the pipeline of a network, and the keys and values that its blocks store.

    Args:
        group: the ranks, in the order of the blocks.
        patches: M.
        warmup: the exact evaluations at the start of a micro-batch.
    """

    method = "PipeFusion"

    def __init__(self, group: Group, patches: int, warmup: int) -> None:
        super().__init__(warmup)
        self.group = group
        self.patches = patches
        self.patch = Patch((), ())
        self._attention: list[PatchAttention] = []
        self._last: Stack | None = None

    def install(self, network: nn.Module, plan: ParallelPlan, kernel: AttentionKernel) -> None:
        """Make a network a stage of the pipeline, in place, apart from the runners of its blocks.

        Args:
            network: the network, written for one device; the blocks of other ranks may have no weights.
            plan: how the network can be sharded.
            kernel: the network's attention kernel.
        """
        self.count_evaluations_of(network)
        self._last = plan.stacks[-1]
        for stack in plan.stacks:
            for name, module in block_stack(network, stack).named_modules():
                local = any(fnmatch(f"{stack.blocks}.{name}", pattern) for pattern in plan.local_attention)
                if "kernel" in vars(module) and not local:
                    module.kernel = PatchAttention(kernel, self)
                    self._attention.append(module.kernel)
        network.register_forward_hook(lambda _, args, output: self.group.broadcast(output, self.group.size - 1))

    def wrap(self, stack: Stack, inner: Runner) -> Runner:
        """Return a runner that passes patches through this rank's blocks (models.blocks.RunnerFeature)."""
        return PipelinedRunner(stack, self, stack is self._last, inner)

    def _release(self) -> None:
        for attention in self._attention:
            attention.kv_cache.clear()


class PatchAttention:
    """Attention of a patch to all patches, or of all tokens at once if an evaluation is exact.

    Args:
        kernel: the attention kernel.
        pipeline: the pipeline, which knows the patch at hand.
    """

    def __init__(self, kernel: AttentionKernel, pipeline: PipeFusion) -> None:
        self.kernel = kernel
        self.pipeline = pipeline
        self.kv_cache: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}

    def __call__(self, q_BlHD: Tensor, k_BlHD: Tensor, v_BlHD: Tensor, mask_Bl: Tensor | None = None) -> Tensor:
        """Attend from the patch at hand, and store its keys and values.

        Args:
            q_BlHD: the queries of the patch.
            k_BlHD: the keys of the patch.
            v_BlHD: the values of the patch.
            mask_Bl: true for real keys; None if all are real. It is stored in exact evaluations.

        Returns:
            The output of the patch, (B, l, H, D).
        """
        patch, fresh_2BlHD = self.pipeline.patch.for_tokens(k_BlHD.shape[1]), torch.stack([k_BlHD, v_BlHD])
        if self.pipeline.is_exact:
            if patch.lengths not in self.kv_cache:
                self.pipeline.cached_bytes += fresh_2BlHD.nbytes
            self.kv_cache[patch.lengths] = fresh_2BlHD, mask_Bl
            return self.kernel(q_BlHD, k_BlHD, v_BlHD, mask_Bl)
        cached_2BSHD, mask_BS = self.kv_cache[patch.lengths]
        patch.write(fresh_2BlHD, cached_2BSHD)
        return self.kernel(q_BlHD, cached_2BSHD[0], cached_2BSHD[1], mask_BS)


class PipelinedRunner:
    """Runs a stack of blocks patch by patch, over all ranks; each rank runs its own blocks.

    The streams that come in are valid on the first rank. Those that come out are valid on the first rank, or on the
    last rank for the last stack. On all other ranks both have the right shapes only.

    Args:
        stack: the plan of the stack.
        pipeline: the pipeline.
        ends: whether this is the last stack of the network.
        inner: the runner of this rank's blocks.
    """

    def __init__(self, stack: Stack, pipeline: PipeFusion, ends: bool, inner: Runner) -> None:
        index, size = pipeline.group.index, pipeline.group.size
        self.stack = stack
        self.pipeline = pipeline
        self.inner = inner
        self.is_first_rank = index == 0
        self.receives_output = index == 0 and not ends
        self.sends_output = index < size - 1 or not ends

    def __call__(self, blocks: Sequence[nn.Module], streams: Streams, shared: Shared) -> Streams:
        """Run the stack.

        Args:
            blocks: the blocks of all ranks.
            streams: the streams before the stack.
            shared: what every block gets.

        Returns:
            The streams after the stack.

        Raises:
            ValueError: if there are fewer tokens than patches; on every rank, before any of them sends.
        """
        group, patches = self.pipeline.group, self._patches({**shared, **streams})
        first, stop = split_evenly(len(blocks), group.size)[group.index]
        receiving = [] if self.is_first_rank else [self._receive(streams, patch) for patch in patches]
        outputs_by_patch: list[Streams] = []
        sends: list[Callable[[], None]] = []
        for number, patch in enumerate(patches):
            local = {name: self._narrow(name, x, patch) for name, x in streams.items()}
            if receiving:
                local = {name: wait() for name, wait in receiving[number].items()}
            shared_part = {name: None if x is None else self._narrow(name, x, patch) for name, x in shared.items()}
            self.pipeline.patch = self._patch(streams, patch)
            outputs = self.inner(blocks[first:stop], local, shared_part)
            if self.sends_output:
                sends += [group.send(x, (group.index + 1) % group.size) for x in outputs.values()]
            else:
                outputs_by_patch.append(outputs)
        if self.receives_output:
            outputs_by_patch = [
                {name: wait() for name, wait in self._receive(streams, patch).items()} for patch in patches
            ]
        for wait in sends:
            wait()
        parts = outputs_by_patch or [streams]
        return {name: torch.cat([part[name] for part in parts], self.stack.sharded[name]) for name in streams}

    def _patches(self, given: Shared) -> list[dict[str, Span]]:
        """Return the spans of every patch, by name of the sharded argument."""
        sharded, count = self.stack.sharded, self.pipeline.patches
        lengths = {name: x.shape[dim] for name, dim in sharded.items() if (x := given[name]) is not None}
        fewest = min(lengths[name] for name in self.stack.streams)
        if fewest < count:
            raise ValueError(f"parallel.patches={count} of {fewest} tokens; use {fewest} or fewer")
        count = 1 if self.pipeline.is_exact else count
        return [
            {name: split_evenly(length, count)[number] for name, length in lengths.items()} for number in range(count)
        ]

    def _patch(self, streams: Streams, patch: dict[str, Span]) -> Patch:
        names = self.stack.streams
        lengths = (streams[name].shape[self.stack.sharded[name]] for name in names)
        return Patch(tuple(lengths), tuple(patch[name] for name in names))

    def _receive(self, streams: Streams, patch: dict[str, Span]) -> dict[str, Callable[[], Tensor]]:
        """Start to receive a patch from the rank before."""
        group = self.pipeline.group
        shapes = {name: self._narrow(name, x, patch) for name, x in streams.items()}
        return {name: group.receive(like.new_empty(like.shape), group.index - 1) for name, like in shapes.items()}

    def _narrow(self, name: str, x: Tensor, patch: dict[str, Span]) -> Tensor:
        """Return the tokens of a patch; the argument itself if it is not sharded."""
        if name not in patch:
            return x
        first, stop = patch[name]
        return x.narrow(self.stack.sharded[name], first, stop - first)
