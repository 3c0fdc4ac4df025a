"""Blocks behind a block cache: without skips nothing changes; with skips the output is what a manual sum gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from harness.caching.blocks import CachedForward, SkipPolicy, forecast
from harness.caching.policies import CachedNetwork, FirstBlockCache, TaylorSeer, TeaCache
from harness.parallel.attention import SequenceState, TokenLayout
from harness.parallel.group import single_process_group
from harness.pipeline.cache_state import CacheState
from models.attention import math_attention
from models.components import Conditioning
from models.plan import Stack
from tests.fixtures.models.parity import rel_l2
from tests.fixtures.parallel.networks import TINY, Inputs, rows

FAMILIES = list(TINY)
NEVER = 1e9  # a threshold that no change reaches
EXACT = 1e-6  # relative L2 between two orders of the same additions
RULES: dict[str, Callable[[float], SkipPolicy]] = {
    "teacache": lambda threshold: TeaCache(1, False, 0, threshold, (1.0, 0.0)),
    "first_block": lambda threshold: FirstBlockCache(1, False, 0, threshold),
    "taylorseer": lambda threshold: TaylorSeer(3, False, 2, 3 if threshold else 1),
}


def cached(name: str, rule: SkipPolicy) -> CachedNetwork:
    tiny = TINY[name]
    return CachedNetwork(tiny.build(math_attention), tiny.plan, rule, single_process_group(), SequenceState())


def evaluations(name: str, count: int) -> list[Inputs]:
    """Return a latent and a time that move a little from one evaluation to the next."""
    latent, tau_B, condition = TINY[name].inputs
    drift = torch.randn(latent.shape, generator=torch.Generator().manual_seed(9))
    return [(latent + 0.05 * k * drift, tau_B * 0.95**k, condition) for k in range(count)]


class Adds(nn.Module):
    """Replaces a stack's blocks: adds known tensors to its streams."""

    def __init__(self, stack: Stack, block: nn.Module, added: Sequence[Tensor]) -> None:
        super().__init__()
        self.stack, self.signature, self.added = stack, inspect.signature(block.forward), added

    def forward(self, *args: object, **kwargs: object) -> object:
        given = self.signature.bind(*args, **kwargs).arguments
        streams = [given[name] + added for name, added in zip(self.stack.outputs, self.added, strict=True)]
        return tuple(streams) if len(streams) > 1 else streams[0]


class ByHand:
    """A plain network whose cached stacks are removed and restored by hand."""

    def __init__(self, name: str, first_block: bool) -> None:
        self.network = TINY[name].build(math_attention)
        self.stacks = [stack for stack in TINY[name].plan.stacks if stack.cacheable]
        self.blocks = [self.network.get_submodule(stack.blocks) for stack in self.stacks]
        self.kept = [list(blocks)[: 1 if first_block and n == 0 else 0] for n, blocks in enumerate(self.blocks)]

    def residuals(self, inputs: Inputs) -> tuple[Tensor, list[list[Tensor]]]:
        """Return the output, and what each stack adds to its streams after the blocks that always run."""
        seen: list[tuple[list[Tensor], list[Tensor]]] = []
        hooks = []
        for stack, blocks, kept in zip(self.stacks, self.blocks, self.kept, strict=True):
            signature = inspect.signature(blocks[0].forward)

            def before(block: nn.Module, args: tuple, kwargs: dict, s: Stack = stack, g: object = signature) -> None:
                given = g.bind(*args, **kwargs).arguments  # type: ignore[attr-defined]
                seen.append(([given[name] for name in s.outputs], []))

            def after(block: nn.Module, args: tuple, output: object) -> None:
                seen[-1][1].extend(output if isinstance(output, tuple) else [output])

            hooks += [
                blocks[len(kept)].register_forward_pre_hook(before, with_kwargs=True),
                blocks[len(blocks) - 1].register_forward_hook(after),
            ]
        output = self.network(*inputs)
        for hook in hooks:
            hook.remove()
        return output, [[b - a for a, b in zip(came, went, strict=True)] for came, went in seen]

    def adding(self, inputs: Inputs, added: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the output where each stack adds only the known tensors."""
        for stack, blocks, kept, own in zip(self.stacks, self.blocks, self.kept, added, strict=True):
            owner, _, leaf = stack.blocks.rpartition(".")
            setattr(self.network.get_submodule(owner), leaf, nn.ModuleList([*kept, Adds(stack, blocks[0], own)]))
            # DiT's head reads its time embedding from its first block
            if not kept and "condition" in dict(blocks[0].named_children()):
                self.network.get_submodule(stack.blocks)[0].condition = blocks[0].condition
        output: Tensor = self.network(*inputs)
        for stack, blocks in zip(self.stacks, self.blocks, strict=True):
            owner, _, leaf = stack.blocks.rpartition(".")
            setattr(self.network.get_submodule(owner), leaf, blocks)
        return output


def cached_outputs(
    network: CachedNetwork, requested: Sequence[Inputs], cache_states: tuple[CacheState, ...]
) -> list[Tensor]:
    with torch.inference_mode():
        return [network(*inputs, cache_states) for inputs in requested]


def between(name: str, kind: str) -> SkipPolicy:
    """A policy whose threshold is 1.5 times the change of the first image in its second evaluation."""
    history = CacheState()
    cached_outputs(cached(name, RULES[kind](NEVER)), [rows(inputs, [0]) for inputs in evaluations(name, 2)], (history,))
    return RULES[kind](1.5 * history.accumulated_change or 1.0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", list(RULES))
def test_with_nothing_to_skip_it_is_the_plain_network_bit_for_bit(name: str, kind: str) -> None:
    histories = (CacheState(), CacheState())
    requested = evaluations(name, 3)
    found = cached_outputs(cached(name, RULES[kind](0.0)), requested, histories)
    with torch.inference_mode():
        plain = TINY[name].build(math_attention)
        assert all(torch.equal(y, plain(*inputs)) for y, inputs in zip(found, requested, strict=True))
    assert all(history.computed == [True] * 3 for history in histories)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["teacache", "first_block"])
def test_what_the_blocks_added_is_added_again(name: str, kind: str) -> None:
    requested = evaluations(name, 3)
    histories = (CacheState(), CacheState())
    found = cached_outputs(cached(name, RULES[kind](NEVER)), requested, histories)
    assert [history.computed for history in histories] == [[True, False, False]] * 2
    by_hand = ByHand(name, first_block=kind == "first_block")
    with torch.inference_mode():
        _, residuals = by_hand.residuals(requested[0])
        for y, inputs in zip(found[1:], requested[1:], strict=True):
            assert rel_l2(y, by_hand.adding(inputs, residuals)) < EXACT
            assert rel_l2(y, by_hand.network(*inputs)) > 1e-4  # so that the test can fail


@pytest.mark.parametrize("name", ["pixart", "flux"])
def test_a_forecast_is_the_taylor_series_of_what_the_blocks_added(name: str) -> None:
    requested = evaluations(name, 7)
    histories = (CacheState(), CacheState())
    found = cached_outputs(cached(name, RULES["taylorseer"](1.0)), requested, histories)
    assert histories[0].computed == [True, True, True, False, False, True, False]
    by_hand = ByHand(name, first_block=False)
    with torch.inference_mode():
        f = {k: by_hand.residuals(requested[k])[1] for k in (0, 1, 2, 5)}

        def series(f0: Tensor, f1: Tensor, f2: Tensor, gaps: tuple[int, int, int], k: int) -> Tensor:
            """Newest first, with evaluations between f1 and f0 and so on."""
            first, before = (f0 - f1) / gaps[0], (f1 - f2) / gaps[1]
            return f0 + k * first + k**2 / 2 * (first - before) / gaps[0]

        for k, newest, gaps in ((3, (2, 1, 0), (1, 1, 0)), (4, (2, 1, 0), (1, 1, 0)), (6, (5, 2, 1), (3, 1, 0))):
            added = [
                [series(*(f[n][s][i] for n in newest), gaps, k - newest[0]) for i in range(len(f[0][s]))]
                for s in range(len(f[0]))
            ]
            assert rel_l2(found[k], by_hand.adding(requested[k], added)) < EXACT


def test_a_forecast_of_order_m_is_exact_for_polynomials_of_degree_m() -> None:
    x = torch.tensor([2.0])
    assert forecast([5 * x, 3 * x, 4 * x], 2) == 5 * 2 + 3 * 2 * 2 + 4 * 2 * 4 / 2


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", list(RULES))
def test_images_in_one_forward_do_not_influence_one_another(name: str, kind: str) -> None:
    """One image is two evaluations ahead of the other, whose text may be longer."""
    requested = evaluations(name, 6)
    network = cached(name, between(name, kind))
    one, other = CacheState(), CacheState()
    alone_one, alone_other = (
        [y[0] for y in cached_outputs(network, [rows(inputs, [n]) for inputs in requested], (owner,))]
        for n, owner in ((0, one), (1, other))
    )
    first, second = CacheState(), CacheState()
    found_first = [y[0] for y in cached_outputs(network, [rows(inputs, [0]) for inputs in requested[:2]], (first,))]
    found_second = []
    with torch.inference_mode():
        for k in range(4):
            later, earlier = requested[k + 2], requested[k]
            both = (
                torch.stack([later[0][0], earlier[0][1]]),
                torch.stack([later[1][0], earlier[1][1]]),
                later[2],
            )
            y = network(*both, (first, second))
            found_first.append(y[0])
            found_second.append(y[1])
    assert first.computed == one.computed
    assert second.computed == other.computed[:4]
    assert not all(first.computed)
    for y, expected in zip([*found_first, *found_second], [*alone_one, *alone_other[:4]], strict=True):
        assert rel_l2(y, expected) < 1e-5


def test_a_neighbour_with_a_longer_text_changes_nothing() -> None:
    """The padding is in the stream that the policy measures, and in what is added."""
    latent, tau_B, _ = TINY["z_image"].inputs
    states = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(4))
    mask = torch.arange(40)[None] < torch.tensor([3, 40])[:, None]
    own, shared = Conditioning(states[:1, :3]), Conditioning(states, mask)
    drift = torch.randn(latent.shape, generator=torch.Generator().manual_seed(9))
    moved = [(latent + 0.05 * k * drift, tau_B * 0.999**k) for k in range(5)]
    totals: list[list[float]] = [[], []]
    outputs: list[list[Tensor]] = [[], []]
    network = cached("z_image", RULES["first_block"](NEVER))
    one, first, second = CacheState(), CacheState(), CacheState()
    with torch.inference_mode():
        for x, tau in moved:
            outputs[0].append(network(x[:1], tau[:1], own, (one,))[0])
            totals[0].append(one.accumulated_change)
        for k, (x, tau) in enumerate(moved):
            alone_now = k == 0  # the neighbour joins after the first
            given = (x[:1], tau[:1], own, (first,)) if alone_now else (x, tau, shared, (first, second))
            outputs[1].append(network(*given)[0])
            totals[1].append(first.accumulated_change)
    assert first.computed == one.computed == [True, False, False, False, False]
    assert totals[1] == pytest.approx(totals[0], rel=1e-4)
    assert all(rel_l2(y, x) < 1e-5 for x, y in zip(*outputs, strict=True))


def test_padding_of_sharded_tokens_has_no_weight() -> None:
    state = SequenceState(TokenLayout((35,), 2), 1)
    rule, tiny = RULES["first_block"](1.0), TINY["pixart"]
    network = CachedNetwork(tiny.build(math_attention), tiny.plan, rule, single_process_group(), state)
    first_block = network.network.get_submodule("blocks")[0]
    weight = first_block._token_weight(
        CachedForward((CacheState(),), rule, single_process_group(), state), {}, torch.zeros(1, 18, 4)
    )
    assert weight[0, :, 0].tolist() == [1.0] * 17 + [0.0]


def test_both_rows_of_a_guided_image_skip_together() -> None:
    requested = evaluations("pixart", 5)
    owner = CacheState()
    network = cached("pixart", between("pixart", "first_block"))
    cached_outputs(network, requested, (owner, owner))
    assert len(owner.computed) == 5
    assert set(owner.computed) == {True, False}


def test_teacache_adds_up_rescaled_changes_of_the_modulated_input() -> None:
    name, coefficients, threshold = "pixart", (0.2, 0.1, 0.001), 0.03
    requested = [rows(inputs, [0]) for inputs in evaluations(name, 6)]
    owner = CacheState()
    cached_outputs(cached(name, TeaCache(1, False, 0, threshold, coefficients)), requested, (owner,))
    network = TINY[name].build(math_attention)
    seen: list[Tensor] = []
    network.blocks[0].self_attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.inference_mode():
        for inputs in requested:
            network(*inputs)
    expected, total = [True], 0.0
    for old, new in pairwise(seen):
        change = float((new - old).abs().mean() / old.abs().mean())
        total += 0.2 * change**2 + 0.1 * change + 0.001
        expected.append(total >= threshold)
        total = 0.0 if expected[-1] else total
    assert owner.computed == expected
    assert expected.count(False) > 1
    assert expected[1:].count(True) > 0


def test_a_forward_that_fails_leaves_no_trace() -> None:
    network, owner = cached("pixart", RULES["first_block"](NEVER)), CacheState()
    latent, tau_B, condition = rows(TINY["pixart"].inputs, [0])
    cached_outputs(network, [(latent, tau_B, condition)], (owner,))
    terms = owner.taylor_terms
    with pytest.raises(ValueError, match="prompt embeddings"), torch.inference_mode():
        network(latent, tau_B, Conditioning(), (owner,))
    assert owner.computed == [True]
    assert owner.taylor_terms is terms


def test_warm_up_and_the_last_step_are_computed() -> None:
    rule = FirstBlockCache(2, True, 0, NEVER)
    assert not rule.should_skip(CacheState(computed=[True]), 0.0)
    assert rule.should_skip(CacheState(computed=[True, True]), 0.0)
    assert not rule.should_skip(CacheState(is_last_step=True, computed=[True, True]), 0.0)
