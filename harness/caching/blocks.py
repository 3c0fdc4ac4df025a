"""Blocks that a forward may pass by: what a cache of blocks does to a network, from outside.

Each block of the stacks that the plan says can be cached stands behind a gate. A picture whose evaluation is computed
passes every block; one whose evaluation is not gets what its stacks added before, or what that is forecast to be now:

    y = x + sum_i d_i k^i / i!      d_0 what the stack added last, d_i its i-th difference a step, k evaluations later

Rows of a batch take their own ways, so that pictures which share a forward do not know of one another; both rows of a
guided picture take one, on whichever ranks they are. Gates stand inside of what deals tokens, and see a rank's part.

Shapes: B rows of a batch, L tokens that this rank has, D channels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial, update_wrapper
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.parallel.attention import SequenceState, TokenLayout
from harness.parallel.group import Group
from harness.pipeline.cache_state import History, Place
from models.plan import ParallelPlan, Stack


class Look(Enum):
    """What a rule is shown of an evaluation before it decides: nothing, the stack's signal as its plan names it, or
    what the first block adds, which is then computed in every evaluation.
    """

    nothing = "nothing"
    signal = "signal"
    first_block = "first block"


class Rule(Protocol):
    """When an evaluation is computed.

    Args:
        look: what it is shown.
        order: of the forecast; 0 adds what was added before.
        from_last: what it is shown is compared with the evaluation before, computed or not; else with the last computed
            one.
    """

    @property
    def look(self) -> Look: ...
    @property
    def order(self) -> int: ...
    @property
    def from_last(self) -> bool: ...

    def total(self, history: History, change: float) -> float:
        """What is added up with this change: mean |new - old| / mean |old| of what it is shown."""

    def skips(self, history: History, total: float) -> bool:
        """Whether the evaluation that comes is not computed."""


class Passage:
    """One forward. What it learns is kept once it is done, so that one that fails can be made again.

    Args:
        owners: of each row of the batch, its picture's history; a guided picture has two rows.
        rule: when a picture's evaluation is computed.
        picture: the ranks that compute these pictures together, which agree.
        state: how tokens are dealt.
    """

    def __init__(self, owners: Sequence[History], rule: Rule, picture: Group, state: SequenceState) -> None:
        self.owners = owners
        self.rule = rule
        self.group = picture
        self.state = state
        rows: dict[int, list[int]] = {}
        for row, owner in enumerate(owners):
            rows.setdefault(id(owner), []).append(row)
        self.pictures = list({id(owner): owner for owner in owners}.values())
        self.rows_of = [rows[id(picture)] for picture in self.pictures]
        self.totals: list[float] = []
        self.skips: list[bool] = []
        self.computing: list[int] | None = None  # rows; None for all
        self.gained: dict[Place, Tensor] = {}
        self._signal: Tensor | None = None
        self._layout: TokenLayout | None = None

    def decide(self, signal: Tensor | None, weight: Tensor | None = None) -> None:
        """Which rows are computed from here on.

        Args:
            signal: what the rule is shown, (B, ...).
            weight: of its tokens, (B, L, 1): 0 where they are padding; None where none is.
        """
        self._signal, self._layout = signal, self.state.layout
        changes = [0.0] * len(self.pictures) if signal is None else self._changes(signal, weight)
        for picture, change in zip(self.pictures, changes, strict=True):
            total = self.rule.total(picture, change)
            same = picture.layout == self._layout  # else a rank's part is of other tokens than it was
            self.totals.append(total)
            self.skips.append(same and bool(picture.terms) and self.rule.skips(picture, total))
        if any(self.skips):
            self.computing = sorted(row for n, skip in enumerate(self.skips) if not skip for row in self.rows_of[n])

    def narrowed(self, name: str, x: Tensor | None) -> Tensor | None:
        """The computing rows of an argument, whose name says where it counts them; what all rows share, as it is."""
        if self.computing is None or x is None or "B" not in (letters := name.rpartition("_")[2]):
            return x
        dim = letters.index("B")
        if x.shape[dim] < len(self.owners):
            return x
        return x.index_select(dim, torch.tensor(self.computing, dtype=torch.int64, device=x.device))

    def whole(self, place: Place, base: Tensor, computed: Tensor) -> Tensor:
        """All rows of a stream behind a stack: those that it computed, and what the others get added to `base`."""
        self.gained[place] = computed - (base if self.computing is None else base[self.computing])
        if self.computing is None:
            return computed
        y = base.clone()
        y[self.computing] = computed
        for n, picture in enumerate(self.pictures):
            if self.skips[n]:
                added = fitted(forecast(picture.terms[place], picture.behind), base.shape[1])
                y[self.rows_of[n]] = base[self.rows_of[n]] + added.to(base.dtype)
        return y

    def keep(self) -> None:
        """Writes what this forward has learned into the histories."""
        rows = self.computing
        for n, picture in enumerate(self.pictures):
            skipped = self.skips[n]
            if not skipped:
                own = self.rows_of[n] if rows is None else [rows.index(row) for row in self.rows_of[n]]
                order = self.rule.order
                picture.terms = {
                    place: expanded(gained[own], picture.terms.get(place, ()), picture.behind, order)
                    for place, gained in self.gained.items()
                }
                picture.layout = self._layout
            if self._signal is not None and (self.rule.from_last or not skipped):
                picture.signal = self._signal[self.rows_of[n]]
            picture.change = self.totals[n] if skipped else 0.0
            picture.computed.append(not skipped)

    def _changes(self, signal: Tensor, weight: Tensor | None) -> list[float]:
        """Of every picture, over all its rows and ranks; infinite where there is nothing to compare with."""
        sums = torch.zeros(len(self.pictures), 2, dtype=torch.float64, device=signal.device)
        for n, picture in enumerate(self.pictures):
            if picture.signal is not None:
                new = signal[self.rows_of[n]].float()
                old = fitted(picture.signal, new.shape[1]).float()
                share = 1.0 if weight is None else weight[self.rows_of[n]]
                sums[n, 0], sums[n, 1] = (((new - old).abs() * share).sum(), (old.abs() * share).sum())
        return [apart / size if size else math.inf for apart, size in self.group.all_reduce(sums).tolist()]


def forecast(terms: Sequence[Tensor], steps: int) -> Tensor:
    """The sum of d_i steps^i / i!, in the dtype of the differences."""
    found = terms[0]
    for i, term in enumerate(terms[1:], 1):
        found = found + term * (steps**i / math.factorial(i))
    return found


def expanded(value: Tensor, before: Sequence[Tensor], steps: int, order: int) -> list[Tensor]:
    """The terms at a computed evaluation, from its value and the terms `steps` evaluations before; differences are
    float32, for they are of numbers that are nearly equal. Terms of another length are those of a longer text.
    """
    terms = [value]
    for i in range(min(order, len(before))):
        terms.append((terms[i].float() - fitted(before[i], value.shape[1]).float()) / steps)
    return terms


def fitted(x: Tensor, length: int) -> Tensor:
    """Cut, or filled up with zeros, to a length of dimension 1: a text's padding, which its neighbours decide."""
    spare = length - x.shape[1]
    return x if spare == 0 else F.pad(x, (0, 0) * (x.ndim - 2) + (0, spare))


class Reached(Exception):
    """The first block has come to the module whose input is the stack's signal."""

    def __init__(self, signal: Tensor) -> None:
        super().__init__()
        self.signal = signal


@dataclass(eq=False)
class Lane:
    """One stack behind gates.

    Args:
        stack: of the plan.
        gates: all of the network, whose passage it is.
        leads: the first of the network's cached stacks, at which the rule decides.
        base: its streams as they came in this forward, or behind the first block where that is always computed.
    """

    stack: Stack
    gates: Gates
    leads: bool
    base: list[Tensor] = field(default_factory=list)


class Gate(nn.Module):
    """A block, and the way past it; it stands in the block's place, and answers for its parts.

    Args:
        block: of the network.
        lane: of its stack.
        first: of the stack.
        last: of the stack.
    """

    def __init__(self, block: nn.Module, lane: Lane, first: bool, last: bool) -> None:
        super().__init__()
        self.block = block
        self.signature = inspect.signature(block.forward)
        self._lane, self._first, self._last = lane, first, last
        self.forward = update_wrapper(partial(self._pass), block.forward)  # the block's signature for who inspects it

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "block" else getattr(self.block, name)

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        lane = self._lane
        passage = lane.gates.passage
        if passage is None:
            return self.block(*args, **kwargs)
        given = self.signature.bind(*args, **kwargs).arguments
        streams = [given[name] for name in lane.stack.outputs]
        streams = self._enter(passage, given, streams) if self._first else self._run(passage, given, streams)
        if self._last:
            places = [(lane.stack.blocks, name) for name in lane.stack.outputs]
            streams = [passage.whole(*three) for three in zip(places, lane.base, streams, strict=True)]
            lane.base = []
        return tuple(streams) if len(streams) > 1 else streams[0]

    def _enter(self, passage: Passage, given: Mapping[str, Any], streams: list[Tensor]) -> list[Tensor]:
        lane, look, ran = self._lane, passage.rule.look, False
        if lane.leads and look is Look.first_block:
            came, streams, ran = streams[0], self._run(passage, given, streams), True
            passage.decide(streams[0] - came, self._weight(passage, given, came))
        elif lane.leads:
            signal = self._signal(given) if look is Look.signal else None
            tokens = signal is not None and lane.stack.signal not in given
            passage.decide(signal, self._weight(passage, given, streams[0]) if tokens else None)
        lane.base = streams
        streams = [x for x in map(passage.narrowed, lane.stack.outputs, streams) if x is not None]
        return streams if ran else self._run(passage, given, streams)

    def _run(self, passage: Passage, given: Mapping[str, Any], streams: list[Tensor]) -> list[Tensor]:
        """The block on the streams' rows; where there is none, they are handed on."""
        if not len(streams[0]):
            return streams
        arguments: dict[str, Any] = dict(zip(self._lane.stack.outputs, streams, strict=True))
        arguments |= {name: passage.narrowed(name, x) for name, x in given.items() if name not in arguments}
        output = self.block(**arguments)
        return list(output) if isinstance(output, tuple) else [output]

    def _signal(self, given: Mapping[str, Any]) -> Tensor:
        """What the plan says that changes as the evaluation does: an argument, or the input of a part of this block,
        which runs as far as there.
        """
        name = self._lane.stack.signal
        if name in given:
            signal: Tensor = given[name]
            return signal

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise Reached(args[0])

        hook = self.block.get_submodule(name).register_forward_pre_hook(stop)
        try:
            self.block(**given)
        except Reached as reached:
            return reached.signal
        finally:
            hook.remove()
        raise ValueError(f"the block never calls {name}, which its plan names")

    def _weight(self, passage: Passage, given: Mapping[str, Any], stream: Tensor) -> Tensor | None:
        """(B, L, 1), 0 where a token of the first stream is padding: by its mask, or as it was dealt."""
        name = self._lane.stack.outputs[0]
        mask_BL = given.get(f"mask_{name.rpartition('_')[2][:2]}")
        layout = passage.state.layout
        if layout is not None:
            of_stream = self._lane.stack.streams.index(name)
            part, length = layout.parts[of_stream], layout.lengths[of_stream]
            place = torch.arange(part, device=stream.device) + passage.state.index * part
            dealt_BL = (place < length).expand(len(stream), -1)
            mask_BL = dealt_BL if mask_BL is None else mask_BL & dealt_BL
        return None if mask_BL is None else mask_BL[..., None].float()


class Gates:
    """All gates of a network, installed in place; without a passage, blocks run as they did.

    Args:
        network: written for one device.
        plan: of its folder.
    """

    def __init__(self, network: nn.Module, plan: ParallelPlan) -> None:
        self.passage: Passage | None = None
        for number, stack in enumerate(stack for stack in plan.stacks if stack.cacheable):
            blocks, lane = network.get_submodule(stack.blocks), Lane(stack, self, leads=number == 0)
            assert isinstance(blocks, nn.ModuleList)
            for k, block in enumerate(blocks):
                blocks[k] = Gate(block, lane, first=k == 0, last=k == len(blocks) - 1)

    @contextmanager
    def open_for(self, passage: Passage) -> Iterator[None]:
        """One forward; what it learned is kept where it did not fail."""
        self.passage = passage
        try:
            yield
        finally:
            self.passage = None
        passage.keep()
