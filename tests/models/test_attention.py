"""Every attention backend computes softmax(q k^T / sqrt(D)) v, against loops over it in float64."""

import math

import pytest
import torch
from torch import Tensor

from models.attention import BACKENDS, attention_kernel, math_attention, sdpa_attention
from models.registry import ATTENTION_BACKENDS, resolve_backend


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One query at a time, in float64."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        kept = torch.arange(k.shape[1]) if mask is None else mask[b].nonzero()[:, 0]
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                scores = k[b, kept, h].double() @ q[b, i, h].double() / math.sqrt(q.shape[-1])
                weights = (scores - scores.max()).exp()
                out[b, i, h] = (weights / weights.sum()) @ v[b, kept, h].double()
    return out


def tensors(queries: int, keys: int, width: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = ((2, queries, 3, width), (2, keys, 3, width), (2, keys, 3, width))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return (scale * q).to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize(("queries", "keys", "width"), [(1, 1, 8), (5, 7, 8), (7, 33, 16), (65, 3, 10)])
def test_backends_agree_with_the_formula(
    backend: str, dtype: torch.dtype, masked: bool, queries: int, keys: int, width: int
) -> None:
    q, k, v = tensors(queries, keys, width, dtype)
    mask = torch.arange(keys)[None] < torch.tensor([[max(1, keys // 2)], [keys]]) if masked else None
    out = BACKENDS[backend](q, k, v, mask)
    assert out.dtype == dtype
    bound = 1e-12 if dtype is torch.float64 else 2e-6
    torch.testing.assert_close(out.double(), by_hand(q, k, v, mask), rtol=bound, atol=bound)


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_extreme_logits_stay_finite(backend: str, scale: float) -> None:
    q, k, v = tensors(5, 7, 8, torch.float64, scale)
    torch.testing.assert_close(BACKENDS[backend](q, k, v, None), by_hand(q, k, v, None), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_what_is_masked_has_no_influence(backend: str) -> None:
    q, k, v = tensors(5, 7, 8, torch.float32)
    mask = torch.tensor([[True, False, True, True, False, False, True], [True] * 7])
    hidden = ~mask[:, :, None, None]
    wild = BACKENDS[backend](q, k.masked_fill(hidden, 1e4), v.masked_fill(hidden, -1e4), mask)
    assert torch.equal(wild, BACKENDS[backend](q, k, v, mask))


def test_bfloat16_softmax_is_wide() -> None:
    """Weights from a float32 softmax, rounded once: a bfloat16 sum over 512 equal keys would lose most of it."""
    q, k = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), torch.zeros(1, 512, 1, 8, dtype=torch.bfloat16)
    v = torch.ones(1, 512, 1, 8, dtype=torch.bfloat16)
    for backend in BACKENDS.values():
        torch.testing.assert_close(backend(q, k, v), torch.ones_like(q), rtol=0.01, atol=0)


def test_auto_is_pytorchs_own_and_names_are_checked() -> None:
    assert attention_kernel("auto") is sdpa_attention
    assert attention_kernel("math") is math_attention
    assert set(BACKENDS) == set(ATTENTION_BACKENDS)
    assert resolve_backend("auto") in BACKENDS
    with pytest.raises(ValueError, match="did you mean flash"):
        attention_kernel("flahs")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_refuses_a_mask_on_cuda() -> None:
    q, k, v = (x.cuda().bfloat16() for x in tensors(5, 7, 8, torch.float32))
    with pytest.raises(NotImplementedError, match="attention=sdpa"):
        BACKENDS["flash"](q, k, v, torch.ones(2, 7, dtype=torch.bool, device="cuda"))


def test_flash_refuses_a_mask_where_the_package_has_none() -> None:
    class OnCuda:
        is_cuda = True

    fake = OnCuda()
    with pytest.raises(NotImplementedError, match="attention=sdpa"):
        BACKENDS["flash"](fake, fake, fake, torch.ones(2, 7, dtype=torch.bool))  # type: ignore[arg-type]
