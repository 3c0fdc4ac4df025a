"""Kernels with log-sum-exp agree with the reference, and parts over disjoint keys merge into one softmax."""

import pytest
import torch
from torch import Tensor

from models.attention.lse import WITH_LSE, lse_kernel, merge
from models.registry import resolve_backend
from tests.fixtures.models.attention_cases import assert_within, exact, mask_of, tensors

FUSED = ("flash",)  # keep their scores in float32; flex runs unfused where log-sum-exp is needed on a CPU
pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # flex warns where it is not compiled


def in_parts(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cuts: list[int]) -> tuple[Tensor, Tensor]:
    """Attend to keys part by part, as a ring brings them, and merge one part after the other."""
    found = None
    for start, stop in zip([0, *cuts], [*cuts, k.shape[1]], strict=True):
        keep = slice(start, stop)
        one = WITH_LSE[name](q, k[:, keep], v[:, keep], None if mask is None else mask[:, keep])
        found = one if found is None else merge(*found, *one)
    assert found is not None
    return found


def score_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if name in FUSED else dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "random", "tail", "empty"])
@pytest.mark.parametrize(
    ("name", "queries", "keys"),
    [
        *((name, *sizes) for name in ("math", "flash") for sizes in ((1, 1), (9, 41), (130, 257))),
        pytest.param("flex", 9, 41, marks=pytest.mark.slow),  # which traces every kind of size again
    ],
)
def test_parts_merge_into_one_softmax(name: str, dtype: torch.dtype, kind: str, queries: int, keys: int) -> None:
    q, k, v = tensors(queries, keys, 10, dtype)
    mask = mask_of(kind, len(q), keys)
    wanted = exact(q, k, v, mask)
    out, lse = in_parts(name, q, k, v, mask, [keys // 4, keys // 2, keys - keys // 5] if keys > 1 else [])
    scores = score_dtype(name, dtype)
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    assert_within(out, wanted.out_BLHD, wanted.out_bound(dtype, scores))
    assert_within(lse, wanted.lse_BLH, wanted.lse_bound(dtype, scores))


@pytest.mark.parametrize("name", ["math", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "random", "tail", "empty"])
@pytest.mark.parametrize(("queries", "keys", "width"), [(9, 4097, 64), (7, 3001, 72), (65, 513, 80), (15, 2000, 128)])
def test_long_sequences_merge_into_one_softmax(
    name: str, dtype: torch.dtype, kind: str, queries: int, keys: int, width: int
) -> None:
    q, k, v = tensors(queries, keys, width, dtype, 2.0)
    mask = mask_of(kind, len(q), keys)
    wanted = exact(q, k, v, mask)
    out, lse = in_parts(name, q, k, v, mask, [keys // 3, keys - 1])
    scores = score_dtype(name, dtype)
    assert_within(out, wanted.out_BLHD, wanted.out_bound(dtype, scores))
    assert_within(lse, wanted.lse_BLH, wanted.lse_bound(dtype, scores))


@pytest.mark.parametrize("name", list(WITH_LSE))
def test_a_sample_without_keys_is_left_out(name: str) -> None:
    q, k, v = tensors(5, 7, 10, torch.float32)
    mask = torch.tensor([[False] * 7, [True] * 7, [True] * 7])
    out, lse = WITH_LSE[name](q, k, v, mask)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (lse[0] == float("-inf")).all()
    whole = WITH_LSE[name](q, k, v, None)
    merged = merge(out, lse, *whole)
    torch.testing.assert_close(merged[0][0], whole[0][0])
    nothing = merge(out, lse, out, lse)
    assert torch.equal(nothing[0][0], torch.zeros_like(out[0]))
    assert (nothing[1][0] == float("-inf")).all()


@pytest.mark.parametrize("name", list(WITH_LSE))
@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_extreme_scores_stay_finite(name: str, scale: float) -> None:
    q, k, v = tensors(5, 8, 10, torch.float64, scale)
    wanted = exact(q, k, v)
    out, lse = in_parts(name, q, k, v, None, [4])
    torch.testing.assert_close(out, wanted.out_BLHD, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, wanted.lse_BLH, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["math", "flash"])
def test_nothing_is_written_into_what_a_ring_sends_on(name: str) -> None:
    q, k, v = tensors(5, 8, 10, torch.float64)
    mask = mask_of("empty", len(q), 8)
    assert mask is not None
    before = [x.clone() for x in (q, k, v, mask)]
    WITH_LSE[name](q, k, v, mask)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v, mask), strict=True))


def test_the_order_of_parts_does_not_matter() -> None:
    q, k, v = tensors(9, 40, 10, torch.float64)
    parts = [WITH_LSE["math"](q, k[:, cut], v[:, cut], None) for cut in (slice(0, 8), slice(8, 30), slice(30, 40))]
    here, there = (merge(*merge(*parts[a], *parts[b]), *parts[c]) for a, b, c in ((0, 1, 2), (2, 0, 1)))
    torch.testing.assert_close(here[0], there[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(here[1], there[1], rtol=1e-13, atol=1e-13)


def test_a_backend_without_log_sum_exp_is_refused() -> None:
    q, k, v = tensors(5, 8, 10, torch.float32)
    automatic, flash = lse_kernel(resolve_backend("auto", with_lse=True))(q, k, v), WITH_LSE["flash"](q, k, v)
    assert torch.equal(automatic[0], flash[0])
    assert torch.equal(automatic[1], flash[1])
    with pytest.raises(ValueError, match=r"attention\.backend=sdpa returns no log-sum-exp.*math, flash, flex"):
        lse_kernel("sdpa")
