"""The seam round a stack of equal blocks: the network calls the stack, and a runner calls its blocks.

    streams = self.blocks(streams, shared)        in the network's forward, one line per stack
    streams = runner(blocks, streams, shared)     what that does

A cache, sequence parallelism, a pipeline of patches and precomputed modulation are runners round a runner.
`wrap_runners` composes them, and the networks know of none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeAlias

from torch import Tensor, nn

from models.plan import ParallelPlan, Stack

Streams: TypeAlias = Mapping[str, Tensor]
"""The tokens that each block passes to the next, by argument of a block, in the order of its outputs."""
Shared: TypeAlias = Mapping[str, Tensor | None]
"""The arguments that every block gets alike: time embedding, rotary tables, masks, encoder hidden states."""


class Runner(Protocol):
    """Runs consecutive blocks of a stack."""

    def __call__(self, blocks: Sequence[nn.Module], streams: Streams, shared: Shared, /) -> Streams:
        """Return the streams after the blocks, in the same order; without blocks, the streams themselves."""


class RunnerFeature(Protocol):
    """Changes how the blocks of a network run."""

    def wrap(self, stack: Stack, inner: Runner, /) -> Runner:
        """Return a runner of this stack round an inner one; the inner one itself if nothing changes."""


def run_blocks(blocks: Sequence[nn.Module], streams: Streams, shared: Shared) -> Streams:
    """Run the blocks one after another.

    Each is called as a module, so that FSDP2's hooks gather its weights, and a compiled `forward` is what runs.

    Returns:
        The streams after the last block.
    """
    for block in blocks:
        output = block(**streams, **shared)
        streams = dict(zip(streams, output if isinstance(output, tuple) else (output,), strict=True))
    return streams


class BlockStack(nn.ModuleList):
    """A stack of equal blocks, with the names that its weights have in an nn.ModuleList.

    Args:
        blocks: The blocks, in order; their forwards take the same arguments.

    Attributes:
        runner: The function that runs the blocks; `run_blocks` unless features are wrapped round it.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks)
        self.runner: Runner = run_blocks

    def forward(self, streams: Streams, shared: Shared) -> Streams:
        """Return the streams after all blocks."""
        return self.runner(tuple(self), streams, shared)


def block_stack(network: nn.Module, stack: Stack) -> BlockStack:
    """Return the stack of blocks that a plan names.

    Raises:
        TypeError: A module of another type.
    """
    blocks = network.get_submodule(stack.blocks)
    if not isinstance(blocks, BlockStack):
        raise TypeError(f"{stack.blocks} is a {type(blocks).__name__}, not a BlockStack")
    return blocks


def wrap_runners(network: nn.Module, plan: ParallelPlan, *features: RunnerFeature | None) -> None:
    """Wrap features round the runner of every stack, in place.

    Args:
        network: The network.
        plan: The network's stacks of blocks.
        features: The features from the blocks outwards; None is left out.
    """
    for stack in plan.stacks:
        blocks = block_stack(network, stack)
        for feature in features:
            if feature is not None:
                blocks.runner = feature.wrap(stack, blocks.runner)


def unwrap_runners(network: nn.Module, plan: ParallelPlan) -> None:
    """Take every feature off the runners of a network's stacks, in place."""
    for stack in plan.stacks:
        block_stack(network, stack).runner = run_blocks
