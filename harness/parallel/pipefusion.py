"""PipeFusion: ranks hold consecutive blocks, and patches of the picture go from rank to rank while others are computed.

In evaluation n the queries of patch m of M meet, in every block,

    K_0^n ... K_m^n, K_(m+1)^(n-1) ... K_(M-1)^(n-1)

the fresh keys and values of the patches that have come by, and those of the evaluation before of the rest; in the first
`warmup` evaluations the picture goes through whole, which is exact. Ranks send activations, and nothing else:

    rank i to i + 1         the outputs of its run of blocks, patch by patch, of every stack of blocks
    the last to the first   those of a stack that is not the last, for the layers between the stacks are everybody's
    the last to all         the network's output

Source: PipeFusion (Fang et al. 2024, arXiv:2405.14430). Unlike there, a solver here steps on whole states,
so that the pipeline fills and drains in every evaluation, and N ranks take (M + N - 1) / (M N) of the time of one; and
every stream that attention joins, text too, is cut into patches as the network's plan says.

Shapes: B batch, l tokens of a patch, S of all patches, H heads, D head dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from harness.parallel.group import Group
from harness.parallel.stale_kv import StaleKVCache
from models.attention import AttentionKernel
from models.parts import Part
from models.plan import ParallelPlan, Stack

Span = tuple[int, int]
"""(first, behind the last)"""


def split_evenly(length: int, parts: int) -> list[Span]:
    """`length` things in so many runs, as even as they can be."""
    return [(length * part // parts, length * (part + 1) // parts) for part in range(parts)]


def drop_blocks(network: nn.Module, plan: ParallelPlan, group: Group) -> dict[str, Part]:
    """Leaves this rank the parameters of its run of blocks and of what lies outside of blocks, in place.

    Returns:
        By parameter of a dropped block that none of it is held, as harness.parallel.parallelize.shard_linears says it.
    """
    parts: dict[str, Part] = {}
    for stack in plan.stacks:
        blocks = network.get_submodule(stack.blocks)
        first, behind = split_evenly(len(list(blocks.children())), group.size)[group.index]
        for number, block in blocks.named_children():
            if not first <= int(number) < behind:
                parts |= _empty_parameters(block, f"{stack.blocks}.{number}", plan.called_outside)
    return parts


def _empty_parameters(block: nn.Module, path: str, called_outside: Sequence[str]) -> Iterator[tuple[str, Part]]:
    for prefix, module in block.named_modules(prefix=path):
        if any(f"{prefix}.".startswith(f"{kept}.") for kept in called_outside):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            part = Part(0, len(parameter), ((0, 0),))
            setattr(module, name, nn.Parameter(part.of(parameter), requires_grad=False))
            yield f"{prefix}.{name}", part


@dataclass(frozen=True)
class Patch:
    """Tokens that are computed at once.

    Args:
        lengths: of the whole streams that attention joins.
        spans: of this patch, in each of them.
    """

    lengths: tuple[int, ...]
    spans: tuple[Span, ...]

    def for_tokens(self, local: int) -> Patch:
        """The patch as a call of attention has it: of all streams joined, or of the last one, the picture, alone."""
        if local == sum(behind - first for first, behind in self.spans):
            return self
        return Patch(self.lengths[-1:], self.spans[-1:])

    def write(self, fresh_2BlHD: Tensor, cached_2BSHD: Tensor) -> None:
        """Its keys and values to where they belong among those of all patches."""
        start = taken = 0
        for length, (first, behind) in zip(self.lengths, self.spans, strict=True):
            count = behind - first
            cached_2BSHD[:, :, start + first : start + behind] = fresh_2BlHD[:, :, taken : taken + count]
            start, taken = start + length, taken + count


class PipeFusion(StaleKVCache):
    """One rank's place in the pipeline of a network, and the keys and values that its blocks keep.

    Args:
        group: the ranks, in the order of the blocks.
        patches: M.
        warmup: evaluations of a micro-batch that are exact.
    """

    method = "PipeFusion"

    def __init__(self, group: Group, patches: int, warmup: int) -> None:
        super().__init__(warmup)
        self.group = group
        self.patches = patches
        self.patch = Patch((), ())
        self._attention: list[PatchAttention] = []

    def install(self, network: nn.Module, plan: ParallelPlan, kernel: AttentionKernel) -> None:
        """Makes a network one of a pipeline, in place.

        Args:
            network: written for one device; the blocks of other ranks may have no weights.
            plan: of its folder.
            kernel: its attention.
        """
        self.count_evaluations_of(network)
        for stack in plan.stacks:
            blocks = network.get_submodule(stack.blocks)
            assert isinstance(blocks, nn.ModuleList)
            for name, module in blocks.named_modules():
                local = any(fnmatch(f"{stack.blocks}.{name}", pattern) for pattern in plan.local_attention)
                if "kernel" in vars(module) and not local:
                    module.kernel = PatchAttention(kernel, self)
                    self._attention.append(module.kernel)
            network.set_submodule(stack.blocks, PipelinedBlocks(blocks, stack, self, stack is plan.stacks[-1]))
        network.register_forward_hook(lambda _, args, output: self.group.broadcast(output, self.group.size - 1))

    def _release(self) -> None:
        for attention in self._attention:
            attention.kv_cache.clear()


class PatchAttention:
    """Attention of a patch to all of them, or of all at once where an evaluation is exact."""

    def __init__(self, kernel: AttentionKernel, pipeline: PipeFusion) -> None:
        self.kernel = kernel
        self.pipeline = pipeline
        self.kv_cache: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}

    def __call__(self, q_BlHD: Tensor, k_BlHD: Tensor, v_BlHD: Tensor, mask_Bl: Tensor | None = None) -> Tensor:
        patch, fresh_2BlHD = self.pipeline.patch.for_tokens(k_BlHD.shape[1]), torch.stack([k_BlHD, v_BlHD])
        if self.pipeline.is_exact:
            if patch.lengths not in self.kv_cache:
                self.pipeline.cached_bytes += fresh_2BlHD.nbytes
            self.kv_cache[patch.lengths] = fresh_2BlHD, mask_Bl
            return self.kernel(q_BlHD, k_BlHD, v_BlHD, mask_Bl)
        cached_2BSHD, mask_BS = self.kv_cache[patch.lengths]
        patch.write(fresh_2BlHD, cached_2BSHD)
        return self.kernel(q_BlHD, cached_2BSHD[0], cached_2BSHD[1], mask_BS)


class PipelinedBlocks(nn.Module):
    """A stack of blocks that its network goes through as if it were one block: patch by patch, over all ranks.

    What the network gives it is the real thing on the first rank, and what it gives back is on the first rank, or where
    the stack is the last one, on the last rank; everywhere else, both have the shapes of it.
    """

    def __init__(self, blocks: nn.ModuleList, stack: Stack, pipeline: PipeFusion, ends: bool) -> None:
        super().__init__()
        for name, block in blocks.named_children():
            self.add_module(name, block)
        index, size = pipeline.group.index, pipeline.group.size
        self.stack = stack
        self.pipeline = pipeline
        self.signature = inspect.signature(blocks[0].forward)
        self.own = range(*split_evenly(len(blocks), size)[index])
        self.is_first_rank = index == 0
        self.receives_output = index == 0 and not ends
        self.sends_output = index < size - 1 or not ends

    def __iter__(self) -> Iterator[nn.Module]:
        yield self

    def __getitem__(self, number: int) -> nn.Module:
        return self.get_submodule(str(number))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A block's arguments to its outputs.

        Raises:
            ValueError: fewer tokens than patches; on every rank alike, before any of them sends.
        """
        bound = self.signature.bind(*args, **kwargs).arguments
        patches, group = self._patches(bound), self.pipeline.group
        receiving = [] if self.is_first_rank else [self._receive(bound, patch) for patch in patches]
        outputs_by_patch: list[dict[str, Tensor]] = []
        sends: list[Callable[[], None]] = []
        for number, patch in enumerate(patches):
            arguments = bound | {
                name: _narrow(bound[name], self.stack.sharded[name], span) for name, span in patch.items()
            }
            if receiving:
                arguments |= {name: wait() for name, wait in receiving[number].items()}
            outputs = self._run_blocks(arguments, self._patch(bound, patch))
            if self.sends_output:
                sends += [group.send(x, (group.index + 1) % group.size) for x in outputs.values()]
            else:
                outputs_by_patch.append(outputs)
        if self.receives_output:
            outputs_by_patch = [
                {name: wait() for name, wait in self._receive(bound, patch).items()} for patch in patches
            ]
        for wait in sends:
            wait()
        return self._concatenate(outputs_by_patch or [bound])

    def _patches(self, bound: dict[str, Any]) -> list[dict[str, Span]]:
        """The spans of every patch, by name of the sharded argument."""
        sharded, count = self.stack.sharded, self.pipeline.patches
        lengths = {name: bound[name].shape[dim] for name, dim in sharded.items() if bound.get(name) is not None}
        fewest = min(lengths[name] for name in self.stack.streams)
        if fewest < count:
            raise ValueError(f"parallel.patches={count} of {fewest} tokens; use {fewest} or fewer")
        count = 1 if self.pipeline.is_exact else count
        return [
            {name: split_evenly(length, count)[number] for name, length in lengths.items()} for number in range(count)
        ]

    def _patch(self, bound: dict[str, Any], patch: dict[str, Span]) -> Patch:
        names = self.stack.streams
        lengths = (bound[name].shape[self.stack.sharded[name]] for name in names)
        return Patch(tuple(lengths), tuple(patch[name] for name in names))

    def _receive(self, bound: dict[str, Any], patch: dict[str, Span]) -> dict[str, Callable[[], Tensor]]:
        """Starts to receive a patch from the rank before."""
        group, sharded = self.pipeline.group, self.stack.sharded
        shapes = {name: _narrow(bound[name], sharded[name], patch[name]) for name in self.stack.outputs}
        return {name: group.receive(like.new_empty(like.shape), group.index - 1) for name, like in shapes.items()}

    def _run_blocks(self, arguments: dict[str, Any], patch: Patch) -> dict[str, Tensor]:
        """This rank's blocks."""
        self.pipeline.patch = patch
        for number in self.own:
            output = self[number](**arguments)
            arguments |= zip(self.stack.outputs, output if isinstance(output, tuple) else (output,), strict=True)
        return {name: arguments[name] for name in self.stack.outputs}

    def _concatenate(self, parts: Sequence[Mapping[str, Any]]) -> Any:
        """What a block returns, from its patches."""
        dims = [(name, self.stack.sharded[name]) for name in self.stack.outputs]
        outputs = tuple(torch.cat([part[name] for part in parts], dim) for name, dim in dims)
        return outputs if len(outputs) > 1 else outputs[0]


def _narrow(x: Tensor, dim: int, span: Span) -> Tensor:
    return x.narrow(dim, span[0], span[1] - span[0])
