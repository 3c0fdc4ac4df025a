"""Displaced patches compute what their definition says, evaluation by evaluation, and send what the formula says."""

from functools import cache, partial

import pytest
import torch
from torch import Tensor

from harness.costs.traffic import sent_bytes, trace_network
from models.attention import math_attention
from tests.fixtures.models.parity import rel_l2
from tests.fixtures.parallel.networks import TINY
from tests.fixtures.parallel.ranks import on_ranks
from tests.fixtures.parallel.stale import (
    EVALUATIONS,
    IMAGES,
    SETTLING,
    displaced,
    exact,
    moving_inputs,
    settling,
    simulated,
    stored_elements,
)

Degrees = tuple[int, ...]
SLOW = ((1, 1, 1, 3, 1), (1, 1, 1, 2, 2), (1, 1, 2, 2, 1), (1, 2, 1, 2, 1))
LAYOUTS = [(1, 1, 1, 2, 1), *(pytest.param(degrees, marks=pytest.mark.slow) for degrees in SLOW)]


def names(degrees: Degrees) -> list[str]:
    return [name for name in TINY if TINY[name].heads() % degrees[2] == 0]


@cache
def ranks_found(degrees: Degrees) -> list[dict[str, Tensor]]:
    size = degrees[1] * degrees[2] * degrees[3] * degrees[4]
    return on_ranks(size, displaced, degrees, names(degrees))


@cache
def said(name: str, degrees: Degrees, warmup: int, stays: bool = False) -> list[Tensor]:
    """By definition a token's part is its place on the ring, and only its own part is fresh."""
    ring, ulysses = degrees[3:]

    def owner(place: int, length: int) -> int:
        return place // -(-length // (ring * ulysses)) // ulysses

    make_inputs, count = (settling, SETTLING) if stays else (moving_inputs, EVALUATIONS)
    return simulated(name, owner, lambda mine, theirs: mine == theirs, warmup, make_inputs, count)


@pytest.mark.parametrize("degrees", LAYOUTS)
def test_ranks_compute_what_the_definition_says(degrees: Degrees) -> None:
    for name in names(degrees):
        plain = exact(name, moving_inputs, EVALUATIONS)
        for warmup in (1, 2):
            for found in ranks_found(degrees):
                for n, (ours, theirs) in enumerate(
                    zip(found[f"{name} {warmup} 0"], said(name, degrees, warmup), strict=True)
                ):
                    assert rel_l2(ours, theirs) < 1e-5, (name, warmup, n)
                    assert (rel_l2(ours, plain[n]) < 1e-5) == (n < warmup), (name, warmup, n)


@pytest.mark.parametrize("degrees", LAYOUTS)
def test_a_second_image_does_not_depend_on_the_first(degrees: Degrees) -> None:
    for name in names(degrees):
        for found in ranks_found(degrees):
            assert torch.equal(found[f"{name} 1 0"], found[f"{name} 1 1"]), name


@pytest.mark.parametrize("degrees", LAYOUTS)
def test_exact_evaluations_are_those_of_gathered_keys_bit_for_bit(degrees: Degrees) -> None:
    for name in names(degrees):
        for found in ranks_found(degrees):
            assert torch.equal(found[f"{name} {EVALUATIONS} 0"], found[f"{name} gathered"]), name


@pytest.mark.parametrize("degrees", LAYOUTS)
def test_ranks_hold_one_output(degrees: Degrees) -> None:
    first, *others = ranks_found(degrees)
    for found in others:
        for name in names(degrees):
            assert torch.equal(found[f"{name} 1 0"], first[f"{name} 1 0"]), name


@pytest.mark.parametrize("degrees", LAYOUTS)
def test_a_state_that_stays_is_exact_after_an_evaluation_a_block(degrees: Degrees) -> None:
    """A block's keys are right one evaluation after all earlier ones are: 2 blocks take 3, more take longer."""
    for name in ("pixart", "dit", "qwen_image", "wan"):
        plain = exact(name, settling, SETTLING)
        errors = [rel_l2(x, plain[n]) for n, x in enumerate(ranks_found(degrees)[0][f"{name} settling"])]
        assert errors[0] < 1e-5
        assert min(errors[1:3]) > 1e-4, (name, errors)
        assert max(errors[3:]) < 1e-5, (name, errors)


@pytest.mark.parametrize("degrees", LAYOUTS)
def test_what_is_sent_and_kept_is_what_the_formulas_say(degrees: Degrees) -> None:
    for name in names(degrees):
        trace = trace_network(partial(TINY[name].make, math_attention), TINY[name].plan, TINY[name].inputs)
        once = sent_bytes(trace, degrees, 4, displaced=True)
        assert once["all_gather displaced"] > 0
        for found in ranks_found(degrees):
            for warmup, images in IMAGES.items():
                key = f"{name} {warmup} sent "
                sent = {kind.removeprefix(key): int(x) for kind, x in found.items() if kind.startswith(key)}
                assert sent == {kind: images * EVALUATIONS * count for kind, count in once.items()}, (name, warmup)
                assert int(found[f"{name} {warmup} kept"]) == 4 * stored_elements(trace, degrees)
