"""Computes once what the evaluations of a request share: modulation, and what the blocks use of the text.

The package of a network states, as data (models.plan.PrecomputePlan), which modules depend on its time embedding alone,
or on its text embedding alone. The outputs of such modules for many evaluations take one matrix product per linear. In
an evaluation each of these modules returns its slice of the precomputed outputs. The sampling grid gives the times of
the evaluations in advance. A time outside the grid (the point of a solver between two rows) is computed when it is
needed.

Shapes: B rows of a forward, V rows of different labels or vectors (1 without them), N evaluations, M output features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from operator import itemgetter
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from models.blocks import Runner, Shared, Streams, block_stack
from models.components import Conditioning, PrecomputableNetwork
from models.plan import PrecomputePlan, Stack

CHUNK_EVALUATIONS = 32
"""Evaluations that are computed at once: enough for an efficient matrix product, and a bound of the memory it takes."""
VECTOR_FIELDS = ("pooled", "labels", "scale")
"""Fields of a conditioning that a network may embed together with the time."""

BlockSlices: TypeAlias = Mapping[str, tuple[int, int]]
"""The first feature of a block's own slice and one past the last, by argument of the block."""


class OutputSlice(nn.Module):
    """Stands in for a module whose output was precomputed, and returns its slice of all precomputed outputs.

    Args:
        source: the module that it replaces.
        start: the first feature of the slice.
        stop: one past the last feature of the slice.
        count: the number of features that it expects.
    """

    def __init__(self, source: nn.Module, start: int, stop: int, count: int) -> None:
        super().__init__()
        self.source = source
        self.start, self.stop, self.count = start, stop, count

    def forward(self, outputs_BM: Tensor) -> Tensor:
        """Return the slice, (B, ..., stop - start).

        Args:
            outputs_BM: precomputed outputs, (B, ..., count).

        Returns:
            The slice of this module.

        Raises:
            ValueError: if the input is no precomputed output.
        """
        if outputs_BM.shape[-1] != self.count:
            raise ValueError(
                f"a network with engine.optimize takes {self.count} precomputed features, not "
                f"{outputs_BM.shape[-1]}; evaluate it with a conditioning of harness.optimize.precompute"
            )
        return outputs_BM[..., self.start : self.stop]


class Passthrough(nn.Module):
    """Stands in for a module whose effect is already in the precomputed outputs, and returns its input.

    Args:
        source: the module that it replaces.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source

    def forward(self, outputs_BM: Tensor, *extra: Tensor) -> Tensor:
        """Return the precomputed outputs unchanged."""
        return outputs_BM


class ModuleChains:
    """Chains of modules with one common input, each replaced in place by its slice of the precomputed outputs.

    A block receives only its own slice, so that its modules do not differ from those of the next block.

    Args:
        network: the network with the modules, changed in place.
        patterns: the chains, as models.plan.PrecomputePlan states them.
        argument: the argument of the blocks that takes the precomputed outputs.

    Attributes:
        slices: the slice of the outputs of each block that has such modules.
    """

    def __init__(self, network: nn.Module, patterns: Sequence[tuple[str, ...]], argument: str) -> None:
        found = sorted(expand_patterns(network, patterns), key=itemgetter(0))
        self._chains = [[network.get_submodule(name) for name in names] for _, names in found]
        stops = list(accumulate(chain[-1].get_parameter("weight").shape[0] for chain in self._chains))
        self.slices: dict[nn.Module, BlockSlices] = {}
        spans = list(zip(found, self._chains, [0, *stops][: len(stops)], stops, strict=True))
        for block, group in groupby(spans, key=lambda span: span[0][0]):
            own = list(group)
            first, last = (own[0][2], own[-1][3]) if block else (0, stops[-1])
            for (_, names), chain, start, stop in own:
                for name, module in zip(names[:-1], chain, strict=False):
                    _replace_module(network, name, Passthrough(module))
                _replace_module(network, names[-1], OutputSlice(chain[-1], start - first, stop - first, last - first))
            if block:
                self.slices[network.get_submodule(block)] = {argument: (first, last)}

    def __call__(self, x: Tensor, *extra: Tensor) -> Tensor:
        """Compute the outputs of all chains, joined along the last dimension.

        Args:
            x: the common input, (..., channels).
            extra: further inputs of the first module of each chain.

        Returns:
            The outputs, (..., M); `x` itself if there are no chains.
        """
        return torch.cat([_run_chain(chain, x, extra) for chain in self._chains], dim=-1) if self._chains else x


class SlicingRunner:
    """Runs blocks one by one, each on its own slice of the precomputed outputs.

    Args:
        slices: the arguments of each block that pass precomputed outputs, with the first feature of the block's own
            and one past the last.
        inner: the runner of one block.
    """

    def __init__(self, slices: Mapping[nn.Module, BlockSlices], inner: Runner) -> None:
        self.slices = slices
        self.inner = inner

    def __call__(self, blocks: Sequence[nn.Module], streams: Streams, shared: Shared) -> Streams:
        """Return the streams after the blocks."""
        for block in blocks:
            own = dict(shared)
            for argument, (start, stop) in self.slices[block].items():
                if (outputs := shared[argument]) is not None:
                    own[argument] = outputs[..., start:stop]
            streams = self.inner((block,), streams, own)
        return streams


def _run_chain(chain: Sequence[nn.Module], x: Tensor, extra: tuple[Tensor, ...]) -> Tensor:
    output: Tensor = chain[0](x, *extra)
    for module in chain[1:]:
        output = module(output)
    return output


def expand_patterns(network: nn.Module, patterns: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Find the chains of modules in a network that patterns stand for.

    Args:
        network: the network to search.
        patterns: chains of module names, with one `*` for the number of a block.

    Yields:
        The name of the chain's block, empty outside of blocks, and the names of the chain's modules.
    """
    names = [name for name, _ in network.named_modules()]
    for chain in patterns:
        prefix, star, suffix = chain[-1].partition("*")
        for name in names if star else chain[-1:]:
            number = name.removeprefix(prefix).removesuffix(suffix) if star else ""
            if name == f"{prefix}{number}{suffix}" and number.isdigit() == bool(star):
                yield f"{prefix}{number}" if star else "", tuple(link.replace("*", number) for link in chain)


def _replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(owner), leaf, module)


class PrecomputedModulation:
    """A network whose modulation and text modules return precomputed outputs; one per worker serves all requests.

    Args:
        network: the network, changed in place; from then on it can be evaluated only as its plan says, and with the
            runners of `wrap`.
        plan: the network's modules that can be precomputed.
        modulation: whether to precompute what depends on time and vectors.
        text: whether to precompute what depends on the text.
    """

    def __init__(self, network: nn.Module, plan: PrecomputePlan, modulation: bool = True, text: bool = True) -> None:
        self._module, self._network = network, cast("PrecomputableNetwork", network)
        self._time_chains = ModuleChains(network, plan.time_chains, plan.time_argument) if modulation else None
        self._text_chains = ModuleChains(network, plan.text_chains, plan.text_argument) if text else None

    def wrap(self, stack: Stack, inner: Runner) -> Runner:
        """Return a runner that gives each block its slice (models.blocks.RunnerFeature)."""
        chains = [chains for chains in (self._time_chains, self._text_chains) if chains is not None]
        slices = {
            block: {name: span for part in chains for name, span in part.slices.get(block, {}).items()}
            for block in block_stack(self._module, stack)
        }
        return SlicingRunner(slices, inner) if any(slices.values()) else inner

    def for_batch(self, condition: Conditioning, taus: Sequence[float]) -> PrecomputedConditioning:
        """Return the conditioning of one micro-batch.

        Args:
            condition: the conditioning of the micro-batch.
            taus: the times at which it will probably be evaluated, in order.

        Returns:
            The conditioning, evaluation by evaluation.
        """
        return PrecomputedConditioning(self, condition, taus)

    def modulation(self, latent: Tensor, taus: Sequence[float], condition: Conditioning) -> Tensor | None:
        """Compute what the blocks need of every time.

        Args:
            latent: the state of the micro-batch, (B, ...).
            taus: the N times.
            condition: the conditioning, with V rows of vectors.

        Returns:
            The outputs of all chains, (N, V, ..., M); None if the evaluations compute them.
        """
        if self._time_chains is None:
            return None
        vectors = {name: x for name in VECTOR_FIELDS if (x := getattr(condition, name)) is not None}
        rows = max((len(x) for x in vectors.values()), default=1)
        tau_B = torch.tensor(taus, dtype=torch.float32, device=latent.device).repeat_interleave(rows)
        repeated = Conditioning(**{name: torch.cat([x] * len(taus)) for name, x in vectors.items()})
        extra = () if repeated.labels is None else (repeated.labels,)
        outputs = self._time_chains(self._network.embed_time(latent[:1], tau_B, repeated), *extra)
        return outputs.unflatten(0, (len(taus), rows))

    def embed_text(self, condition: Conditioning) -> Conditioning:
        """Return the conditioning with the outputs of the text chains in place of the prompt embeddings."""
        if self._text_chains is None:
            return condition
        embedded = self._network.embed_text(condition)
        if embedded.encoder_hidden_states is None:
            return embedded
        return replace(embedded, encoder_hidden_states=self._text_chains(embedded.encoder_hidden_states))


class PrecomputedConditioning:
    """The conditioning of one micro-batch, evaluation by evaluation; each part is computed when it is first needed.

    Args:
        precompute: what computes the parts.
        condition: the conditioning of the micro-batch.
        taus: the times at which it will probably be evaluated, in order.
    """

    def __init__(self, precompute: PrecomputedModulation, condition: Conditioning, taus: Sequence[float]) -> None:
        self._precompute = precompute
        self._condition = condition
        self._taus = list(taus)
        self._embedded: Conditioning | None = None
        self._rows: dict[float, Tensor] = {}

    def at(self, latent: Tensor, tau: float) -> Conditioning:
        """Return the conditioning of one evaluation.

        Args:
            latent: the state that is evaluated, (B, ...).
            tau: the time of the evaluation.

        Returns:
            The conditioning, with a time embedding of B rows if it was precomputed.
        """
        if self._embedded is None:
            self._embedded = self._precompute.embed_text(self._condition)
        if (temb := self._row(latent, tau)) is None:
            return self._embedded
        return replace(self._embedded, temb=temb.expand(len(latent), *temb.shape[1:]))

    def _row(self, latent: Tensor, tau: float) -> Tensor | None:
        if tau in self._rows:
            return self._rows[tau]
        chunk = self._taus[self._taus.index(tau) :][:CHUNK_EVALUATIONS] if tau in self._taus else [tau]
        rows = self._precompute.modulation(latent, chunk, self._condition)
        if rows is None:
            return None
        if tau in self._taus:
            self._rows = dict(zip(chunk, rows, strict=True))
        return rows[0]
