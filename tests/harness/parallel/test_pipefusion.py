"""A pipeline of patches computes what its definition says; a rank holds only the weights of its blocks."""

from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.costs.traffic import pipe_bytes, trace_network
from harness.parallel.pipefusion import PipeFusion, drop_blocks
from models.attention import math_attention
from models.blocks import wrap_runners
from models.checkpoint_source import CheckpointSource
from tests.fixtures.models.parity import rel_l2
from tests.fixtures.parallel.networks import TINY
from tests.fixtures.parallel.ranks import on_ranks
from tests.fixtures.parallel.slices import group_of, load, saved
from tests.fixtures.parallel.stale import (
    EVALUATIONS,
    IMAGES,
    SETTLING,
    exact,
    moving_inputs,
    piped,
    settling,
    simulated,
    stored_elements,
)

PIPELINES = [(2, 3), pytest.param(3, 4, marks=pytest.mark.slow)]
"""Ranks and patches: one block on each rank, and a case where one rank has none."""


@cache
def ranks_found(ranks: int, patches: int) -> list[dict[str, Tensor]]:
    return on_ranks(ranks, piped, (1, 1, 1, ranks, 1), patches, list(TINY))


@cache
def said(name: str, patches: int, warmup: int) -> list[Tensor]:
    """By definition, patches that have already passed are fresh."""

    def owner(place: int, length: int) -> int:
        return ((place + 1) * patches - 1) // length

    return simulated(name, owner, lambda mine, theirs: theirs <= mine, warmup, moving_inputs, EVALUATIONS)


@pytest.mark.parametrize(("ranks", "patches"), PIPELINES)
def test_ranks_compute_what_the_definition_says(ranks: int, patches: int) -> None:
    for name in TINY:
        plain = exact(name, moving_inputs, EVALUATIONS)
        for found in ranks_found(ranks, patches):
            for warmup in (1, 2):
                theirs = said(name, patches, warmup)
                for n, ours in enumerate(found[f"{name} {warmup} 0"]):
                    assert rel_l2(ours, theirs[n]) < 1e-5, (name, warmup, n)
                    assert (rel_l2(ours, plain[n]) < 1e-5) == (n < warmup), (name, warmup, n)


@pytest.mark.parametrize(("ranks", "patches"), PIPELINES)
def test_exact_evaluations_are_those_of_one_rank_bit_for_bit(ranks: int, patches: int) -> None:
    for name in TINY:
        plain = torch.stack(exact(name, moving_inputs, EVALUATIONS))
        for found in ranks_found(ranks, patches):
            assert torch.equal(found[f"{name} {EVALUATIONS} 0"], plain), name


@pytest.mark.parametrize(("ranks", "patches"), PIPELINES)
def test_images_differ_and_ranks_hold_one_output(ranks: int, patches: int) -> None:
    first, *_ = ranks_found(ranks, patches)
    for found in ranks_found(ranks, patches):
        for name in TINY:
            assert torch.equal(found[f"{name} 1 0"], found[f"{name} 1 1"]), name
            assert torch.equal(found[f"{name} 1 0"], first[f"{name} 1 0"]), name


@pytest.mark.parametrize(("ranks", "patches"), PIPELINES)
def test_a_state_that_stays_is_exact_after_an_evaluation_a_block(ranks: int, patches: int) -> None:
    """A block's keys are right one evaluation after all earlier ones are: 2 blocks take 3, more take longer."""
    for name in ("pixart", "dit", "qwen_image", "wan"):
        plain = exact(name, settling, SETTLING)
        errors = [rel_l2(x, plain[n]) for n, x in enumerate(ranks_found(ranks, patches)[0][f"{name} settling"])]
        assert errors[0] < 1e-5
        assert min(errors[1:3]) > 2e-5, (name, errors)
        assert max(errors[3:]) < 1e-5, (name, errors)


@pytest.mark.parametrize(("ranks", "patches"), PIPELINES)
def test_what_is_sent_and_kept_is_what_the_formulas_say(ranks: int, patches: int) -> None:
    for name in TINY:
        trace = trace_network(partial(TINY[name].make, math_attention), TINY[name].plan, TINY[name].inputs)
        kept = 0
        for index, found in enumerate(ranks_found(ranks, patches)):
            once = pipe_bytes(trace, TINY[name].plan, ranks, index, 4)
            for warmup, images in IMAGES.items():
                key = f"{name} {warmup} sent "
                sent = {kind.removeprefix(key): int(x) for kind, x in found.items() if kind.startswith(key) and x}
                assert sent == {kind: images * EVALUATIONS * count for kind, count in once.items()}, (name, warmup)
            kept += int(found[f"{name} 1 kept"])
        assert kept == 4 * stored_elements(trace, (1, 1, 1, 1, 1))


@pytest.mark.parametrize("name", TINY)
def test_a_rank_reads_its_blocks_and_what_lies_outside(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    whole = load(name, CheckpointSource(tmp_path)).state_dict()
    held: dict[str, int] = dict.fromkeys(whole, 0)
    for rank in range(2):
        source = CheckpointSource(tmp_path, shard_network=partial(drop_blocks, group=group_of(2, rank)))
        network = load(name, source)
        for key, x in network.state_dict().items():
            assert x.numel() == 0 or torch.equal(x, whole[key])
            held[key] += x.numel() > 0
        assert source.loaded["transformer"].bytes == sum(p.nbytes for p in network.parameters())
    outside = TINY[name].plan.called_outside
    for key, times in held.items():
        sharded = any(key.startswith(f"{stack.blocks}.") for stack in TINY[name].plan.stacks)
        assert times == (1 if sharded and not key.startswith(tuple(f"{kept}." for kept in outside)) else 2), key


def test_more_patches_than_tokens_are_refused() -> None:
    tiny = TINY["sd3"]
    network = tiny.build(math_attention)
    pipeline = PipeFusion(group_of(2, 0), 8, 1)
    pipeline.install(network, tiny.plan, math_attention)
    wrap_runners(network, tiny.plan, pipeline)
    with pytest.raises(ValueError, match=r"parallel\.patches=8 of 7 tokens; use 7 or fewer"):
        network(*tiny.inputs)
