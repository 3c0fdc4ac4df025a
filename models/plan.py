"""How a network can be sharded over ranks, and what of it can be precomputed.

This is data that each family's folder states; `harness.parallel` and `harness.optimize` apply it from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dims:
    """What the dimensions of a block's argument count.

    Args:
        batch: The dimension that counts the rows of a batch; None if all rows share the argument.
        tokens: The dimension that counts tokens, which can be sharded; None if every rank holds the argument in full.
    """

    batch: int | None = 0
    tokens: int | None = None


@dataclass(frozen=True)
class Stack:
    """A run of equal blocks whose tokens can be sharded over ranks.

    Args:
        blocks: The name of the network's BlockStack.
        arguments: The arguments of a block's forward that the network passes, with the dimensions of each.
        replicated: The arguments whose tokens every rank holds in full (the text of a cross-attention).
        outputs: The outputs of a block, in order: the names of the sharded arguments that receive them in the next
            block.
        streams: The sharded arguments that attention joins, in the order of the concatenation.
        mask: The argument that is true for the real tokens of the first output; empty if all are real.
        cacheable: Whether a block cache may skip the stack; false if it prepares the input of a later one.
        signal: The tensor that TeaCache compares: an argument of the first block, or the module of it whose input it
            is.
    """

    blocks: str
    arguments: Mapping[str, Dims]
    replicated: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("x_BLD",)
    streams: tuple[str, ...] = ("x_BLD",)
    mask: str = ""
    cacheable: bool = True
    signal: str = ""

    @property
    def sharded(self) -> dict[str, int]:
        """The arguments whose tokens can be sharded, with the dimension that counts them."""
        return {name: dims.tokens for name, dims in self.arguments.items() if dims.tokens is not None}


@dataclass(frozen=True)
class ParallelPlan:
    """The parallel plan of one network.

    Args:
        heads: The config field that counts attention heads, which Ulysses and tensor parallelism divide; None if the
            network supports neither.
        stacks: The stacks of blocks for sequence parallelism, in the order of the forward; empty if it is not
            supported.
        column: The linears sharded by output features (patterns of fnmatch over module names).
        row: The linears sharded by input features, whose outputs are summed over ranks.
        head_norms: The norms over a full width that column-parallel linears shard; their mean needs a sum over ranks.
        joined_rows: The row linears (patterns) whose input joins the outputs of several column linears, and the
            relative widths of those; each one is sharded separately.
        local_attention: The modules whose keys are replicated (patterns), so that each rank's queries attend locally.
        called_outside: The modules of a block that the network also calls itself; weight sharding leaves them
            unsharded.
    """

    heads: str | None = None
    stacks: tuple[Stack, ...] = ()
    column: tuple[str, ...] = ()
    row: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = field(default=())
    joined_rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    local_attention: tuple[str, ...] = field(default=())
    called_outside: tuple[str, ...] = field(default=())


UNSHARDED = ParallelPlan()
"""The plan of a network that cannot be sharded."""


@dataclass(frozen=True)
class PrecomputePlan:
    """The modules of a PrecomputableNetwork whose outputs depend only on `embed_time`, or only on `embed_text`.

    A chain is the names of modules that feed one another. The first gets the time embedding (and the class labels, if
    there are any) or the text. The modules of a chain share one `*`, the number of a block.

    Args:
        time_chains: The chains that only `embed_time` feeds; together they must use all of its output.
        time_argument: The argument of the blocks that passes the time embedding to them.
        text_chains: The chains that only `embed_text` feeds.
        text_argument: The argument of the blocks that passes the text to them.
        has_text: Whether the network takes text.
    """

    time_chains: tuple[tuple[str, ...], ...] = ()
    time_argument: str = ""
    text_chains: tuple[tuple[str, ...], ...] = ()
    text_argument: str = ""
    has_text: bool = True
