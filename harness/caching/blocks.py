"""A block cache: it lets a forward skip the blocks of a network, and is installed from outside.

It is a runner of the stacks that the plan marks as cacheable. An image whose evaluation is computed goes through every
block. An image whose evaluation is skipped gets what its stacks added before, or a forecast
of what they would add now:

    y = x + sum_i d_i k^i / i!      d_0 what the stack added last, d_i its i-th difference per step, k evaluations later

The rows of a batch are decided independently, so that images which share a forward do not affect one another. Both rows
of a guided image are skipped or computed together, on whichever ranks they are. The cache is inside of the runner that
shards tokens, and sees the tokens of one rank.

Shapes: B rows of a batch, L tokens of this rank, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.parallel.attention import SequenceState, TokenLayout
from harness.parallel.group import Group
from harness.pipeline.cache_state import CacheState, StreamKey
from models.blocks import Runner, Shared, Streams
from models.plan import ParallelPlan, Stack


class SkipSignal(Enum):
    """What a skip policy sees of an evaluation before it decides.

    Attributes:
        none: nothing.
        stack: the signal of the first cached stack, which its plan names.
        first_block: what the first block adds; that block is then computed in every evaluation.
    """

    none = "none"
    stack = "stack"
    first_block = "first block"


class SkipPolicy(Protocol):
    """Decides which evaluations are computed.

    Attributes:
        signal: what the policy sees of an evaluation.
        order: the order of the forecast; 0 adds again what was added last.
        compares_latest: whether the signal is compared with the evaluation before, computed or not; otherwise with the
            last computed one.
    """

    @property
    def signal(self) -> SkipSignal:
        """What the policy sees of an evaluation."""

    @property
    def order(self) -> int:
        """The order of the forecast."""

    @property
    def compares_latest(self) -> bool:
        """Whether the signal is compared with the evaluation before, computed or not."""

    def accumulate(self, state: CacheState, change: float) -> float:
        """Return the accumulated change after this one: mean |new - old| / mean |old| of the signal."""

    def should_skip(self, state: CacheState, accumulated_change: float) -> bool:
        """Return whether the next evaluation is skipped."""


class CachedForward:
    """One forward of a network with a block cache.

    The cache states change only when the forward is complete, so that a failed one can be repeated.

    Args:
        cache_states: the state of the image of each row of the batch; a guided image has two rows.
        policy: decides when the evaluation of an image is computed.
        replica: the ranks that compute these images together; they make the same decisions.
        sequence: how tokens are sharded.
    """

    def __init__(
        self, cache_states: Sequence[CacheState], policy: SkipPolicy, replica: Group, sequence: SequenceState
    ) -> None:
        self.cache_states = cache_states
        self.policy = policy
        self.group = replica
        self.sequence = sequence
        rows: dict[int, list[int]] = {}
        for row, state in enumerate(cache_states):
            rows.setdefault(id(state), []).append(row)
        self.image_states = list({id(state): state for state in cache_states}.values())
        self.rows_of_image = [rows[id(state)] for state in self.image_states]
        self.accumulated_changes: list[float] = []
        self.skipped: list[bool] = []
        self.computed_rows: list[int] | None = None  # None for all
        self.residuals: dict[StreamKey, Tensor] = {}
        self._signal: Tensor | None = None
        self._layout: TokenLayout | None = None

    def decide(self, signal: Tensor | None, weight: Tensor | None = None) -> None:
        """Choose the rows that are computed from here on.

        Args:
            signal: what the policy sees, (B, ...).
            weight: the weight of each token of the signal, (B, L, 1), 0 for padding; None without padding.
        """
        self._signal, self._layout = signal, self.sequence.layout
        changes = [0.0] * len(self.image_states) if signal is None else self._relative_changes(signal, weight)
        for state, change in zip(self.image_states, changes, strict=True):
            accumulated_change = self.policy.accumulate(state, change)
            same_layout = state.layout == self._layout  # otherwise this rank has other tokens than before
            self.accumulated_changes.append(accumulated_change)
            can_skip = same_layout and bool(state.taylor_terms)
            self.skipped.append(can_skip and self.policy.should_skip(state, accumulated_change))
        if any(self.skipped):
            self.computed_rows = sorted(
                row for n, skip in enumerate(self.skipped) if not skip for row in self.rows_of_image[n]
            )

    def select_rows(self, x: Tensor, dim: int | None) -> Tensor:
        """Select the computed rows of a block's argument.

        Args:
            x: the argument.
            dim: the dimension that counts rows; None if all rows share the argument.

        Returns:
            The computed rows; the argument itself if all rows are computed or share it.
        """
        if self.computed_rows is None or dim is None or x.shape[dim] < len(self.cache_states):
            return x
        return x.index_select(dim, torch.tensor(self.computed_rows, dtype=torch.int64, device=x.device))

    def merge_rows(self, key: StreamKey, base: Tensor, computed: Tensor) -> Tensor:
        """Return all rows of a stream after a stack: the computed ones, and a forecast for the skipped ones.

        Args:
            key: the stack and the stream.
            base: all rows of the stream before the stack, (B, L, D).
            computed: the computed rows after the stack.

        Returns:
            The stream, (B, L, D).
        """
        self.residuals[key] = computed - (base if self.computed_rows is None else base[self.computed_rows])
        if self.computed_rows is None:
            return computed
        y = base.clone()
        y[self.computed_rows] = computed
        for n, state in enumerate(self.image_states):
            if self.skipped[n]:
                added = fit_length(forecast(state.taylor_terms[key], state.steps_since_computed), base.shape[1])
                y[self.rows_of_image[n]] = base[self.rows_of_image[n]] + added.to(base.dtype)
        return y

    def commit(self) -> None:
        """Write the results of this forward into the cache states."""
        rows = self.computed_rows
        for n, state in enumerate(self.image_states):
            skipped = self.skipped[n]
            if not skipped:
                own = self.rows_of_image[n] if rows is None else [rows.index(row) for row in self.rows_of_image[n]]
                order = self.policy.order
                state.taylor_terms = {
                    key: update_taylor_terms(
                        residual[own], state.taylor_terms.get(key, ()), state.steps_since_computed, order
                    )
                    for key, residual in self.residuals.items()
                }
                state.layout = self._layout
            if self._signal is not None and (self.policy.compares_latest or not skipped):
                state.signal = self._signal[self.rows_of_image[n]]
            state.accumulated_change = self.accumulated_changes[n] if skipped else 0.0
            state.computed.append(not skipped)

    def _relative_changes(self, signal: Tensor, weight: Tensor | None) -> list[float]:
        """Compute the change of each image's signal over all its rows and ranks; infinite for a first signal."""
        sums = torch.zeros(len(self.image_states), 2, dtype=torch.float64, device=signal.device)
        for n, state in enumerate(self.image_states):
            if state.signal is not None:
                new = signal[self.rows_of_image[n]].float()
                old = fit_length(state.signal, new.shape[1]).float()
                token_weight = 1.0 if weight is None else weight[self.rows_of_image[n]]
                sums[n, 0], sums[n, 1] = (((new - old).abs() * token_weight).sum(), (old.abs() * token_weight).sum())
        return [difference / size if size else math.inf for difference, size in self.group.all_reduce(sums).tolist()]


def forecast(terms: Sequence[Tensor], steps: int) -> Tensor:
    """Return sum_i d_i steps^i / i!, in the dtype of the differences d_i."""
    total = terms[0]
    for i, term in enumerate(terms[1:], 1):
        total = total + term * (steps**i / math.factorial(i))
    return total


def update_taylor_terms(value: Tensor, previous: Sequence[Tensor], steps: int, order: int) -> list[Tensor]:
    """Compute the Taylor terms at a computed evaluation.

    Differences are float32, because they are of nearly equal numbers. Previous terms may have another length, that of a
    longer text in the same batch.

    Args:
        value: what a stack added in this evaluation.
        previous: the terms of the last computed evaluation.
        steps: evaluations since that one.
        order: the highest difference that is wanted.

    Returns:
        The terms d_0, d_1, ... up to the order, as far as there are previous ones.
    """
    terms = [value]
    for i in range(min(order, len(previous))):
        terms.append((terms[i].float() - fit_length(previous[i], value.shape[1]).float()) / steps)
    return terms


def fit_length(x: Tensor, length: int) -> Tensor:
    """Cut dimension 1 to a length, or pad it with zeros: the padding of a text depends on its neighbours in a batch."""
    missing = length - x.shape[1]
    return x if missing == 0 else F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))


class SignalReached(Exception):
    """Raised when the first block calls the module whose input is the stack's signal.

    Args:
        signal: the input.
    """

    def __init__(self, signal: Tensor) -> None:
        super().__init__()
        self.signal = signal


class CachedRunner:
    """Runs a stack of blocks on the rows that are computed.

    Args:
        stack: the plan of the stack.
        cache: the block cache of the network.
        decides: True for the first cached stack of the network, at which the policy decides.
        inner: the runner of the blocks.
    """

    def __init__(self, stack: Stack, cache: BlockCache, decides: bool, inner: Runner) -> None:
        self.stack = stack
        self.cache = cache
        self.decides = decides
        self.inner = inner

    def __call__(self, blocks: Sequence[nn.Module], streams: Streams, shared: Shared) -> Streams:
        """Return the streams after the blocks, computed or forecast row by row."""
        forward = self.cache.active_forward
        if forward is None:
            return self.inner(blocks, streams, shared)
        if self.decides:
            blocks, streams = self._decide(forward, blocks, streams, shared)
        dims = self.stack.arguments
        computed: Streams = {name: forward.select_rows(x, dims[name].batch) for name, x in streams.items()}
        if forward.computed_rows != []:
            selected = {n: x if x is None else forward.select_rows(x, dims[n].batch) for n, x in shared.items()}
            computed = self.inner(blocks, computed, selected)
        return {name: forward.merge_rows((self.stack.blocks, name), x, computed[name]) for name, x in streams.items()}

    def _decide(
        self, forward: CachedForward, blocks: Sequence[nn.Module], streams: Streams, shared: Shared
    ) -> tuple[Sequence[nn.Module], Streams]:
        """Let the policy decide.

        Args:
            forward: the forward.
            blocks: the blocks of the stack.
            streams: the streams before the stack.
            shared: what every block gets.

        Returns:
            The blocks that may be skipped, and the streams before them.
        """
        name, kind = self.stack.outputs[0], forward.policy.signal
        if kind is SkipSignal.first_block:
            before, streams = streams[name], self.inner(blocks[:1], streams, shared)
            forward.decide(streams[name] - before, self.token_weight(forward, before, shared))
            return blocks[1:], streams
        signal = self._stack_signal(blocks, streams, shared) if kind is SkipSignal.stack else None
        has_tokens = signal is not None and self.stack.signal not in self.stack.arguments
        forward.decide(signal, self.token_weight(forward, streams[name], shared) if has_tokens else None)
        return blocks, streams

    def _stack_signal(self, blocks: Sequence[nn.Module], streams: Streams, shared: Shared) -> Tensor:
        """Return the signal that the plan names: an argument, or the input of a module of the first block.

        In the second case the block runs as far as that module.

        Args:
            blocks: the blocks of the stack.
            streams: the streams before the stack.
            shared: what every block gets.

        Returns:
            The signal.

        Raises:
            ValueError: if the block never calls that module, or the network passes no such argument.
        """
        name = self.stack.signal
        if name in self.stack.arguments:
            argument = {**shared, **streams}[name]
            if argument is None:
                raise ValueError(f"the network passes no {name}, which its plan names as the signal")
            return argument

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise SignalReached(args[0])

        hook = blocks[0].get_submodule(name).register_forward_pre_hook(stop)
        try:
            self.inner(blocks[:1], streams, shared)
        except SignalReached as reached:
            return reached.signal
        finally:
            hook.remove()
        raise ValueError(f"the block never calls {name}, which its plan names as the signal")

    def token_weight(self, forward: CachedForward, stream: Tensor, shared: Shared) -> Tensor | None:
        """Compute the weight of every token of the first stream.

        Args:
            forward: the forward.
            stream: the first stream, (B, L, D).
            shared: what every block gets.

        Returns:
            The weights, (B, L, 1), 0 where a token is padding, by its mask or by the sharding; None without padding.
        """
        mask_BL = shared.get(self.stack.mask)
        layout = forward.sequence.layout
        if layout is not None:
            index = self.stack.streams.index(self.stack.outputs[0])
            local_length, length = layout.local_lengths[index], layout.lengths[index]
            positions = torch.arange(local_length, device=stream.device) + forward.sequence.index * local_length
            is_token_BL = (positions < length).expand(len(stream), -1)
            mask_BL = is_token_BL if mask_BL is None else mask_BL & is_token_BL
        return None if mask_BL is None else mask_BL[..., None].float()


class BlockCache:
    """The cached stacks of a network (models.blocks.RunnerFeature); outside of a forward, blocks run as they did.

    Args:
        plan: the network's stacks of blocks.
    """

    def __init__(self, plan: ParallelPlan) -> None:
        self.active_forward: CachedForward | None = None
        self._first = next((stack for stack in plan.stacks if stack.cacheable), None)

    def wrap(self, stack: Stack, inner: Runner) -> Runner:
        """Return a runner that can skip the blocks of a stack."""
        return CachedRunner(stack, self, stack is self._first, inner) if stack.cacheable else inner

    @contextmanager
    def activate(self, forward: CachedForward) -> Iterator[None]:
        """Run one forward through the cache, and update the cache states unless it fails.

        Args:
            forward: the forward.

        Yields:
            Nothing, while the forward runs.
        """
        self.active_forward = forward
        try:
            yield
        finally:
            self.active_forward = None
        forward.commit()
