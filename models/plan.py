"""How a network may be cut over ranks, and what of it computed beforehand: data that its folder states, and that
`harness.parallel` and `harness.optimize` apply from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stack:
    """A run of equal blocks whose tokens can be dealt over ranks.

    Args:
        blocks: name of the network's nn.ModuleList.
        sharded: arguments of a block's forward that are cut, with the dimension that counts tokens.
        replicated: arguments with tokens that every rank holds whole (the text of a cross-attention).
        outputs: what a block returns, in order: the names of the sharded arguments that take it up in the next one.
        streams: the sharded arguments that attention joins, in the order of the concatenation.
        cached: whether a cache of blocks may pass it by; not where it prepares what a later one works on.
        signal: what TeaCache looks at: an argument of the first block, or the module of it whose input that is.
    """

    blocks: str
    sharded: Mapping[str, int]
    replicated: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("x_BLD",)
    streams: tuple[str, ...] = ("x_BLD",)
    cached: bool = True
    signal: str = ""


@dataclass(frozen=True)
class ParallelPlan:
    """The whole plan of one network.

    Args:
        heads: name of the config's field that counts attention heads, which Ulysses and tensor parallelism divide;
            None for a network that neither can cut.
        stacks: runs of blocks for sequence parallelism, in the order of the forward; none where it cannot be.
        column: linears cut by output features (patterns of fnmatch over module names).
        row: linears cut by input features, whose outputs are summed over ranks.
        head_norms: norms over a whole width that column-parallel linears cut; their mean needs a sum over ranks.
        joined_rows: row linears (patterns) whose input joins the outputs of several column linears, and the relative
            widths of those: each is cut on its own.
        local_attention: modules whose keys are replicated (patterns): their queries attend where they are.
        called_outside: modules of a block that the network calls itself too; where weights are dealt over ranks, these
            stay whole.
    """

    heads: str | None = None
    stacks: tuple[Stack, ...] = ()
    column: tuple[str, ...] = ()
    row: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = field(default=())
    joined_rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    local_attention: tuple[str, ...] = field(default=())
    called_outside: tuple[str, ...] = field(default=())


WHOLE = ParallelPlan()
"""Of a network that is not cut."""


@dataclass(frozen=True)
class AheadPlan:
    """Modules of an AheadNetwork whose outputs depend on its `tell`, or on its `read`, alone.

    A chain is the names of modules that feed one another, the first of them fed what was told (and the class labels,
    where there are any) or read. They share one `*`, the number of a block.

    Args:
        told: chains that nothing but `tell` feeds; together they must take all that is made of it.
        told_as: the argument of the blocks that hands it to them.
        read: the same of `read`.
        read_as: likewise.
        text: the network reads a text.
    """

    told: tuple[tuple[str, ...], ...] = ()
    told_as: str = ""
    read: tuple[tuple[str, ...], ...] = ()
    read_as: str = ""
    text: bool = True
