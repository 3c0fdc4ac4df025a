"""What stays the same between the evaluations of a request, computed once: modulation and text.

A network's folder says, as data (models.plan.AheadPlan), which modules are fed by nothing but what it tells its blocks
of the time, or by the text. Their outputs for many evaluations are one matrix product a linear; in an evaluation each
of these modules takes its columns of what came out. The sampling grid says which times will be asked for; one that is
not among them (a solver's point between two rows) is computed when it comes.

Shapes: B rows of a forward, V rows of different labels or vectors (1 where there are none), N evaluations, M columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.components import AheadNetwork, Conditioning
from models.plan import AheadPlan

EVALUATIONS = 32  # computed at once: enough for a matrix product to be worth its name, and a bound of what is kept
VECTORS = ("pooled", "labels", "scale")  # fields of a conditioning that a network may tell its blocks beside the time


class Columns(nn.Module):
    """In place of a module whose output was computed beforehand: its columns of all that was.

    Args:
        source: the module.
        start, stop, count: its columns of so many.
    """

    def __init__(self, source: nn.Module, start: int, stop: int, count: int) -> None:
        super().__init__()
        self.source = source
        self.start, self.stop, self.count = start, stop, count

    def forward(self, made_BM: Tensor) -> Tensor:
        if made_BM.shape[-1] != self.count:
            raise ValueError(
                f"a network with engine.optimize takes {self.count} columns that were computed beforehand, not "
                f"{made_BM.shape[-1]}; evaluate it with a conditioning of harness.optimize.precompute"
            )
        return made_BM[..., self.start : self.stop]


class First(nn.Module):
    """In place of a module whose output is in the columns: hands them on."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source

    def forward(self, made_BM: Tensor, *beside: Tensor) -> Tensor:
        return made_BM


class Chains:
    """Modules that one input feeds, replaced in place by their columns of what is computed beforehand.

    A block is handed its own columns alone, so that the modules in it do not differ from those of the next block.

    Args:
        network: whose modules they are.
        patterns: of models.plan.AheadPlan.
        argument: of the blocks that takes the columns.
    """

    def __init__(self, network: nn.Module, patterns: Sequence[tuple[str, ...]], argument: str) -> None:
        found = sorted(expanded(network, patterns), key=itemgetter(0))
        self._chains = [[network.get_submodule(name) for name in names] for _, names in found]
        stops = list(accumulate(chain[-1].get_parameter("weight").shape[0] for chain in self._chains))
        columns = list(zip(found, self._chains, [0, *stops][: len(stops)], stops, strict=True))
        for block, group in groupby(columns, key=lambda column: column[0][0]):
            own = list(group)
            first, last = (own[0][2], own[-1][3]) if block else (0, stops[-1])
            for (_, names), chain, start, stop in own:
                for name, module in zip(names[:-1], chain, strict=False):
                    _put(network, name, First(module))
                _put(network, names[-1], Columns(chain[-1], start - first, stop - first, last - first))
            if block:
                hook = _Narrowed(network.get_submodule(block), argument, first, last)
                network.get_submodule(block).register_forward_pre_hook(hook, with_kwargs=True)

    def __call__(self, fed: Tensor, *beside: Tensor) -> Tensor:
        """All columns, (..., M), of what the first module of every chain is fed; `fed` itself where there is none."""
        return torch.cat([_through(chain, fed, beside) for chain in self._chains], dim=-1) if self._chains else fed


class _Narrowed:
    """A hook before a block: of what it is handed, its own columns."""

    def __init__(self, block: nn.Module, argument: str, start: int, stop: int) -> None:
        self.signature = inspect.signature(block.forward)
        self.argument = argument
        self.start, self.stop = start, stop

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        bound.arguments[self.argument] = bound.arguments[self.argument][..., self.start : self.stop]
        return bound.args, bound.kwargs


def _through(chain: Sequence[nn.Module], fed: Tensor, beside: tuple[Tensor, ...]) -> Tensor:
    made: Tensor = chain[0](fed, *beside)
    for module in chain[1:]:
        made = module(made)
    return made


def expanded(network: nn.Module, patterns: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The chains that patterns stand for in a network, each behind the name of its block, empty outside of them."""
    names = [name for name, _ in network.named_modules()]
    for chain in patterns:
        before, star, behind = chain[-1].partition("*")
        for name in names if star else chain[-1:]:
            number = name.removeprefix(before).removesuffix(behind) if star else ""
            if name == f"{before}{number}{behind}" and number.isdigit() == bool(star):
                yield f"{before}{number}" if star else "", tuple(link.replace("*", number) for link in chain)


def _put(network: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(owner), leaf, module)


class Ahead:
    """A network whose modules were replaced by what is computed beforehand; one a worker, shared by its requests.

    Args:
        network: changed in place; it can be evaluated only as its plan says from then on.
        plan: of its folder.
        modulation: what depends on time and vectors.
        text: what depends on the text.
    """

    def __init__(self, network: nn.Module, plan: AheadPlan, modulation: bool = True, text: bool = True) -> None:
        self._network = cast("AheadNetwork", network)
        self._told = Chains(network, plan.told, plan.told_as) if modulation else None
        self._read = Chains(network, plan.read, plan.read_as) if text else None

    def request(self, condition: Conditioning, taus: Sequence[float]) -> Told:
        """Of one micro-batch: its conditioning, and the times that it will probably be evaluated at, in order."""
        return Told(self, condition, taus)

    def told(self, latent: Tensor, taus: Sequence[float], condition: Conditioning) -> Tensor | None:
        """What the blocks are told at every time, (N, V, ..., M); None where that is left to the evaluations."""
        if self._told is None:
            return None
        vectors = {name: x for name in VECTORS if (x := getattr(condition, name)) is not None}
        rows = max((len(x) for x in vectors.values()), default=1)
        tau_B = torch.tensor(taus, dtype=torch.float32, device=latent.device).repeat_interleave(rows)
        many = Conditioning(**{name: torch.cat([x] * len(taus)) for name, x in vectors.items()})
        beside = () if many.labels is None else (many.labels,)
        made = self._told(self._network.tell(latent[:1], tau_B, many), *beside)
        return made.unflatten(0, (len(taus), rows))

    def read(self, condition: Conditioning) -> Conditioning:
        """The conditioning with what the blocks read of the text."""
        if self._read is None:
            return condition
        read = self._network.read(condition)
        return read if read.context is None else replace(read, context=self._read(read.context))


class Told:
    """The conditioning of one micro-batch, evaluation by evaluation; all is computed when it is first asked for."""

    def __init__(self, ahead: Ahead, condition: Conditioning, taus: Sequence[float]) -> None:
        self._ahead = ahead
        self._plain = condition
        self._taus = list(taus)
        self._read: Conditioning | None = None
        self._rows: dict[float, Tensor] = {}

    def at(self, latent: Tensor, tau: float) -> Conditioning:
        """That of an evaluation of `latent`, (B, ...), at one time."""
        if self._read is None:
            self._read = self._ahead.read(self._plain)
        if (told := self._row(latent, tau)) is None:
            return self._read
        return replace(self._read, told=told.expand(len(latent), *told.shape[1:]))

    def _row(self, latent: Tensor, tau: float) -> Tensor | None:
        if tau in self._rows:
            return self._rows[tau]
        ahead = self._taus[self._taus.index(tau) :][:EVALUATIONS] if tau in self._taus else [tau]
        told = self._ahead.told(latent, ahead, self._plain)
        if told is None:
            return None
        if tau in self._taus:
            self._rows = dict(zip(ahead, told, strict=True))
        return told[0]
