"""Tiny networks asked again and again, on ranks that keep keys and values; and what that comes to, in one process."""

import inspect
from collections.abc import Callable
from datetime import timedelta
from fnmatch import fnmatch
from functools import partial

import torch
from torch import Tensor, nn

from harness.parallel.displaced import DisplacedPatches
from harness.parallel.mesh import RankPosition
from harness.parallel.parallelize import shard_linears, shard_tokens
from harness.parallel.pipefusion import PipeFusion, drop_blocks
from harness.parallel.process_groups import ProcessGroups, make_process_groups
from harness.parallel.stale_kv import StaleKVCache
from models.attention import math_attention
from models.attention.lse import math_lse
from models.plan import Stack
from tests.parallel.layouts import branches
from tests.parallel.networks import TINY, Inputs, Tiny

EVALUATIONS = 3
PICTURES = {1: 2, 2: 1, EVALUATIONS: 1}
"""How many are drawn one after another, by the number of exact evaluations."""

SETTLING = 5  # evaluations of one input, after one of another

Ask = Callable[[Tiny, int], Inputs]
"""From a network and the number of an evaluation to what it is asked."""

Owner = Callable[[int, int], int]
"""From a token's place in a stream and the stream's length to its part, of those that are fresh to one another."""


def asked(tiny: Tiny, evaluation: int) -> Inputs:
    """What a network is asked in an evaluation: a state that moves."""
    latent, tau_B, condition = tiny.inputs
    return latent * (1 - 0.15 * evaluation) + 0.1 * evaluation, tau_B - 4 * evaluation, condition


def settling(tiny: Tiny, evaluation: int) -> Inputs:
    """One state, then another one that stays."""
    return asked(tiny, min(evaluation, 1))


class Simulated:
    """Attention over all tokens as ranks compute it: of each part's queries to its own keys and values, and to those of
    the other parts that `fresh` says, of this evaluation; to the rest of the evaluation before.

    Args:
        owner: of tokens.
        fresh: whether (part of the queries, part of the keys) meet in the same evaluation.
        warmup: evaluations in which all do.
    """

    def __init__(self, owner: Owner, fresh: Callable[[int, int], bool], warmup: int) -> None:
        self.owner = owner
        self.fresh = fresh
        self.warmup = warmup
        self.evaluation = 0
        self.lengths: tuple[int, ...] = ()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.calls = 0

    def listen(self, network: nn.Module, tiny: Tiny) -> None:
        """Takes the place of every attention that a layout deals."""
        network.register_forward_pre_hook(lambda *_: self._begin())
        for stack in tiny.plan.stacks:
            blocks = network.get_submodule(stack.blocks)
            assert isinstance(blocks, nn.ModuleList)
            for name, module in blocks.named_modules():
                local = any(fnmatch(f"{stack.blocks}.{name}", pattern) for pattern in tiny.plan.local_attention)
                if "kernel" in vars(module) and not local:
                    module.kernel = self
            for block in blocks:
                block.register_forward_pre_hook(self._reader(stack), with_kwargs=True)

    def _begin(self) -> None:
        self.evaluation, self.calls = self.evaluation + 1, 0

    def _reader(self, stack: Stack) -> Callable[..., None]:
        def read(block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            given = inspect.signature(block.forward).bind(*args, **kwargs).arguments
            self.lengths = tuple(given[name].shape[stack.sharded[name]] for name in stack.streams)

        return read

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        k_before, v_before = self.before.get(self.calls, (k, v))
        self.before[self.calls] = (k, v)
        if self.evaluation <= self.warmup:
            return math_attention(q, k, v, mask)
        lengths = self.lengths if k.shape[1] == sum(self.lengths) else self.lengths[-1:]
        owners = torch.tensor([self.owner(place, length) for length in lengths for place in range(length)])
        out = torch.empty_like(q)
        for part in owners.unique().tolist():
            now = torch.tensor([self.fresh(part, int(owner)) for owner in owners])[None, :, None, None]
            queries = owners == part
            out[:, queries] = math_attention(
                q[:, queries], torch.where(now, k, k_before), torch.where(now, v, v_before), mask
            )
        return out


def simulated(
    name: str,
    owner: Owner,
    fresh: Callable[[int, int], bool],
    warmup: int,
    ask: Ask,
    count: int,
) -> list[Tensor]:
    """The outputs of so many evaluations, in one process."""
    tiny = TINY[name]
    network, simulation = tiny.build(math_attention), Simulated(owner, fresh, warmup)
    simulation.listen(network, tiny)
    with torch.inference_mode():
        return [network(*ask(tiny, n)) for n in range(count)]


def exact(name: str, ask: Ask, count: int) -> list[Tensor]:
    """The same by the network as it is."""
    tiny = TINY[name]
    network = tiny.build(math_attention)
    with torch.inference_mode():
        return [network(*ask(tiny, n)) for n in range(count)]


def outputs(network: nn.Module, tiny: Tiny, groups: ProcessGroups, ask: Ask, count: int) -> Tensor:
    """Of so many evaluations, guidance applied."""
    combine = branches(tiny.inputs, groups.cfg).combine
    return torch.stack([combine(network(*ask(tiny, n))) for n in range(count)])


def drawn(
    build: Callable[[int], tuple[nn.Module, StaleKVCache]], tiny: Tiny, groups: ProcessGroups
) -> dict[str, Tensor]:
    """Outputs of a state that moves, by the number of exact evaluations and the picture, and what was sent and kept for
    them; and of a state that stays.

    Args:
        build: the network for a number of exact evaluations, and what it keeps.
        tiny: of it.
        axes: of this rank.
    """
    found = {}
    for warmup, pictures in PICTURES.items():
        network, stale = build(warmup)
        groups.traffic.reset()
        for picture in range(pictures):
            stale.begin()
            found[f"{warmup} {picture}"] = outputs(network, tiny, groups, asked, EVALUATIONS)
            found[f"{warmup} kept"] = torch.tensor(stale.cached_bytes)
            stale.end()
        found |= {f"{warmup} sent {kind}": torch.tensor(count) for kind, count in groups.traffic.sent_bytes.items()}
    network, stale = build(1)
    stale.begin()
    found["settling"] = outputs(network, tiny, groups, settling, SETTLING)
    stale.end()
    return found


def displaced(rank: int, size: int, degrees: tuple[int, ...], names: list[str]) -> dict[str, Tensor]:
    """What is drawn by displaced patches, by network, and with keys and values that are gathered at once."""
    groups = make_process_groups(RankPosition(rank, degrees), torch.device("cpu"), timedelta(seconds=60))
    found: dict[str, Tensor] = {}
    for name, tiny in ((name, TINY[name]) for name in names):
        dealt = partial(displaced_network, tiny, groups)
        found[f"{name} gathered"] = outputs(dealt(None)[0], tiny, groups, asked, EVALUATIONS)
        found |= {f"{name} {what}": x for what, x in drawn(dealt, tiny, groups).items()}
    return found


def displaced_network(tiny: Tiny, groups: ProcessGroups, warmup: int | None) -> tuple[nn.Module, StaleKVCache]:
    """A network whose ring keeps keys and values, or gathers them where no evaluation is exact before the others."""
    network = tiny.build(math_attention)
    shard_linears(network, tiny.plan, groups.tp)
    stale = DisplacedPatches(groups.ring, warmup or 1)
    gather, kept = warmup is None, None if warmup is None else stale
    shard_tokens(network, tiny.plan, math_attention, math_lse, groups, gather, kept)
    return network, stale


def piped(rank: int, size: int, degrees: tuple[int, ...], patches: int, names: list[str]) -> dict[str, Tensor]:
    """What is drawn by a pipeline of patches, by network."""
    groups = make_process_groups(RankPosition(rank, degrees), torch.device("cpu"), timedelta(seconds=60))
    found: dict[str, Tensor] = {}
    for name, tiny in ((name, TINY[name]) for name in names):
        found |= {
            f"{name} {what}": x
            for what, x in drawn(partial(piped_network, tiny, groups, patches), tiny, groups).items()
        }
    return found


def piped_network(tiny: Tiny, groups: ProcessGroups, patches: int, warmup: int) -> tuple[nn.Module, StaleKVCache]:
    """A network of which this rank has its run of blocks."""
    network, stale = tiny.build(math_attention), PipeFusion(groups.ring, patches, warmup)
    drop_blocks(network, tiny.plan, groups.ring)
    stale.install(network, tiny.plan, math_attention)
    return network, stale
