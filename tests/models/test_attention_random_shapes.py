"""Every backend that a CPU runs, on random shapes and scores, on long sequences and on extreme logits."""

import random
from dataclasses import dataclass

import pytest
import torch

from models.attention import backend as backend_of
from tests.fixtures.models.attention_cases import assert_within, exact, mask_of, tensors

FUSED = ("sdpa", "flash")  # keep their scores in float32 or better
DTYPES = {
    "math": (torch.float64, torch.float32, torch.bfloat16),
    "sdpa": (torch.float64, torch.float32, torch.bfloat16),
    "flash": (torch.float64, torch.float32, torch.bfloat16),
    "flex": (torch.float64,),  # the dtype in which it compiles nothing; its log-sum-exp compiles in no dtype
}
EACH = [
    pytest.param(backend, dtype, marks=[pytest.mark.slow] if backend == "flex" else [])  # it traces each kind of size
    for backend, dtypes in DTYPES.items()
    for dtype in dtypes
]
LARGEST = 30.0  # the largest score of the reference in bfloat16; above it no single weight is exact
pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # flex warns where it is not compiled


@dataclass(frozen=True)
class Shape:
    """The sizes of one attention, the mask's kind, and the scale of its scores."""

    batch: int
    queries: int
    keys: int
    heads: int
    width: int
    mask: str
    scale: float


def random_shape(seed: int) -> Shape:
    """Return random sizes: one token and hundreds, odd ones, widths that no kernel has."""
    any_of = random.Random(seed)
    mask, scale = any_of.choice(("none", "random", "tail", "empty")), any_of.choice((0.1, 1.0, 30.0, 1e4))
    small, large = any_of.randint(1, 9), any_of.randint(1, 300)
    queries, keys = any_of.sample((small, large), 2)
    return Shape(any_of.randint(1, 3), queries, keys, any_of.randint(1, 5), any_of.randint(1, 140), mask, scale)


def assert_agrees(backend: str, dtype: torch.dtype, shape: Shape) -> None:
    """The output, and the log-sum-exp where there is one, agree with float64 as far as rounding allows."""
    sizes = (shape.queries, shape.keys, shape.width)
    scale = min(shape.scale, LARGEST) if (backend, dtype) == ("math", torch.bfloat16) else shape.scale
    q, k, v = tensors(*sizes, dtype, scale, shape.batch, shape.heads)
    mask = mask_of(shape.mask, shape.batch, shape.keys)
    wanted = exact(q, k, v, mask)
    scores = torch.promote_types(dtype, torch.float32) if backend in FUSED else dtype
    out = backend_of(backend).attend(q, k, v, mask)
    assert out.dtype == dtype
    assert_within(out, wanted.out_BLHD, wanted.out_bound(dtype, scores))
    attend_lse = backend_of(backend).attend_lse
    if attend_lse is not None:
        out, lse = attend_lse(q, k, v, mask)
        assert_within(out, wanted.out_BLHD, wanted.out_bound(dtype, scores))
        assert_within(lse, wanted.lse_BLH, wanted.lse_bound(dtype, scores))


@pytest.mark.parametrize(("backend", "dtype"), EACH, ids=str)
def test_random_shapes(backend: str, dtype: torch.dtype) -> None:
    for seed in range(3 if backend == "flex" else 12):
        assert_agrees(backend, dtype, random_shape(seed))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype"), EACH, ids=str)
@pytest.mark.parametrize("mask", ["none", "random"])
def test_as_many_queries_as_keys_in_a_long_sequence(backend: str, dtype: torch.dtype, mask: str) -> None:
    """An image's tokens attend to one another; their number is odd and no multiple of any kernel's block."""
    assert_agrees(backend, dtype, Shape(1, 4099, 4099, 1, 24, mask, 2.0))


@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_a_long_sequence(backend: str) -> None:
    assert_agrees(backend, torch.float32, Shape(1, 1001, 4099, 1, 10, "random", 2.0))


@pytest.mark.parametrize(("backend", "dtype"), EACH, ids=str)
@pytest.mark.parametrize("mask", ["none", "empty"])
def test_logits_of_ten_thousands(backend: str, dtype: torch.dtype, mask: str) -> None:
    """Logits of both signs; their exponentials are infinite and zero in every dtype."""
    assert_agrees(backend, dtype, Shape(2, 33, 129, 2, 72, mask, 1e4))
