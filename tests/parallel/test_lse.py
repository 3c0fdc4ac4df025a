"""Kernels with log-sum-exp agree with the formula, and parts over disjoint keys merge into one softmax."""

import pytest
import torch
from torch import Tensor

from models.attention import math_attention
from models.attention.lse import WITH_LSE, lse_kernel, merge


def tensors(dtype: torch.dtype, queries: int, keys: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    q, k, v = (torch.randn(2, n, 3, 10, generator=generator, dtype=torch.float64) for n in (queries, keys, keys))
    return (scale * q).to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("name", list(WITH_LSE))
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (9, 40), (130, 257)])
def test_parts_merge_into_one_softmax(
    name: str, dtype: torch.dtype, bound: float, masked: bool, queries: int, keys: int
) -> None:
    q, k, v = tensors(dtype, queries, keys)
    mask = torch.ones(2, keys, dtype=torch.bool)
    if masked:
        mask[0, : keys // 2] = keys == 1
    exact = math_attention(q.double(), k.double(), v.double(), mask)
    scores = torch.einsum("blhd,bshd->blhs", q.double(), k.double()) / 10**0.5
    lse = scores.masked_fill(~mask[:, None, None], float("-inf")).logsumexp(-1)
    part = -(-keys // 4)
    found = None
    for start in range(0, keys, part):
        keep = slice(start, start + part)
        one = WITH_LSE[name](q, k[:, keep], v[:, keep], mask[:, keep] if masked else None)
        found = one if found is None else merge(*found, *one)
    assert found is not None
    torch.testing.assert_close(found[0].double(), exact, rtol=bound, atol=bound)
    torch.testing.assert_close(found[1].double(), lse, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", list(WITH_LSE))
def test_a_sample_without_keys_is_left_out(name: str) -> None:
    q, k, v = tensors(torch.float32, 5, 7)
    mask = torch.tensor([[False] * 7, [True] * 7])
    out, lse = WITH_LSE[name](q, k, v, mask)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (lse[0] == float("-inf")).all()
    whole = WITH_LSE[name](q, k, v, None)
    merged = merge(out, lse, *whole)
    torch.testing.assert_close(merged[0][0], whole[0][0])
    nothing = merge(out, lse, out, lse)
    assert nothing[0][0].isfinite().all()


@pytest.mark.parametrize("name", list(WITH_LSE))
@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_extreme_scores_stay_finite(name: str, scale: float) -> None:
    q, k, v = tensors(torch.float64, 5, 8, scale)
    halves = [WITH_LSE[name](q, k[:, part], v[:, part], None) for part in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(merge(*halves[0], *halves[1])[0], math_attention(q, k, v), rtol=1e-9, atol=1e-9)


def test_a_backend_without_log_sum_exp_is_refused() -> None:
    assert lse_kernel("auto") is WITH_LSE["flash"]
    with pytest.raises(ValueError, match=r"attention\.backend=sdpa returns no log-sum-exp.*math or flash"):
        lse_kernel("sdpa")
