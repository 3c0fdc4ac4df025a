"""Every attention backend computes softmax(q k^T / sqrt(D)) v, against loops and against the reference in float64."""

import importlib.machinery
import importlib.util
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

import conf
from models.attention import BACKENDS, attention_kernel, math_attention, resolved_name, sdpa_attention
from models.attention import backend as backend_of
from models.attention.flash import FlashPackage, flash_package
from models.attention.flash import run_package as flash_with
from models.attention.sage import SagePackage
from models.attention.sage import run_package as sage_with
from models.registry import ATTENTION_BACKENDS, resolve_backend
from schedulers.registry import OURS, imported
from tests.fixtures.models.attention_cases import assert_within, exact, mask_of, tensors

EVERY = (*BACKENDS, "flex")  # what a CPU runs; flex in float64, where it compiles nothing
MASKS = ("none", "random", "tail", "empty")
pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # flex warns where it is not compiled


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute one query at a time, in float64."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        kept = torch.arange(k.shape[1]) if mask is None else mask[b].nonzero()[:, 0]
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                scores = k[b, kept, h].double() @ q[b, i, h].double() / math.sqrt(q.shape[-1])
                if len(kept):
                    weights = (scores - scores.max()).exp()
                    out[b, i, h] = (weights / weights.sum()) @ v[b, kept, h].double()
    return out


def score_dtype(backend: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a backend keeps its scores: float32 in fused kernels, else the tensors' dtype."""
    return dtype if backend == "math" else torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("backend", "queries", "keys", "width"),
    [
        *((backend, *sizes) for backend in BACKENDS for sizes in ((1, 1, 8), (5, 7, 8), (65, 3, 10))),
        ("flex", 5, 7, 8),  # which traces every kind of size again
    ],
)
def test_backends_agree_with_the_formula(backend: str, kind: str, queries: int, keys: int, width: int) -> None:
    q, k, v = tensors(queries, keys, width, torch.float64)
    mask = mask_of(kind, len(q), keys)
    out = backend_of(backend).attend(q, k, v, mask)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, by_hand(q, k, v, mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("queries", "keys", "width", "scale"),
    [(9, 4097, 64, 1.0), (7, 3001, 72, 3.0), (129, 130, 40, 3.0), (65, 513, 80, 1.0), (15, 2000, 128, 3.0)],
)
def test_backends_agree_with_the_reference_within_rounding(
    backend: str, dtype: torch.dtype, kind: str, queries: int, keys: int, width: int, scale: float
) -> None:
    q, k, v = tensors(queries, keys, width, dtype, scale)
    mask = mask_of(kind, len(q), keys)
    wanted = exact(q, k, v, mask)
    out = BACKENDS[backend](q, k, v, mask)
    assert out.dtype == dtype
    assert_within(out, wanted.out_BLHD, wanted.out_bound(dtype, score_dtype(backend, dtype)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "width", "kind"),
    [(torch.float32, 40, "none"), (torch.float32, 72, "empty"), (torch.bfloat16, 72, "empty")],
)
def test_compiled_flex_agrees_with_the_reference(dtype: torch.dtype, width: int, kind: str) -> None:
    """One kernel is called twice: the second mask must not be that of the first."""
    try:
        resolved_name("flex", "cpu")
    except NotImplementedError as lacking:
        pytest.skip(str(lacking))
    q, k, v = tensors(37, 517, width, dtype, 3.0)
    for mask in (mask_of(kind, len(q), 517), mask_of("none" if kind == "none" else "tail", len(q), 517)):
        wanted = exact(q, k, v, mask)
        with torch.inference_mode():
            out = backend_of("flex").attend(q, k, v, mask)
        assert out.dtype == dtype
        assert_within(out, wanted.out_BLHD, wanted.out_bound(dtype, torch.float32))


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_extreme_logits_stay_finite(backend: str, scale: float) -> None:
    q, k, v = tensors(5, 7, 8, torch.float64, scale)
    torch.testing.assert_close(backend_of(backend).attend(q, k, v, None), by_hand(q, k, v, None), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_extreme_logit_takes_all(backend: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(5, 300, 64, dtype)
    k[:, 123] = 1e4 * q[:, :1].sign()[:, 0]
    out = BACKENDS[backend](q[:, :1], k, v, None)
    torch.testing.assert_close(out, v[:, 123:124])


@pytest.mark.parametrize("backend", EVERY)
def test_what_is_masked_has_no_influence(backend: str) -> None:
    q, k, v = tensors(5, 7, 8, torch.float64 if backend == "flex" else torch.float32)
    mask = torch.tensor([[True, False, True, True, False, False, True], [True] * 7, [True, True] + [False] * 5])
    hidden = ~mask[:, :, None, None]
    wild = backend_of(backend).attend(q, k.masked_fill(hidden, 1e4), v.masked_fill(hidden, -1e4), mask)
    assert torch.equal(wild, backend_of(backend).attend(q, k, v, mask))


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_nothing_is_written_into_what_is_handed_in(backend: str) -> None:
    """A ring sends its keys on after it used them."""
    q, k, v = tensors(5, 7, 8, torch.float64)
    mask = mask_of("empty", len(q), 7)
    assert mask is not None
    before = [x.clone() for x in (q, k, v, mask)]
    backend_of(backend).attend(q, k, v, mask)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v, mask), strict=True))


def test_bfloat16_softmax_is_wide() -> None:
    """Weights come from a float32 softmax, rounded once: a bfloat16 sum over 512 equal keys would lose most of it."""
    q, k = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), torch.zeros(1, 512, 1, 8, dtype=torch.bfloat16)
    v = torch.ones(1, 512, 1, 8, dtype=torch.bfloat16)
    for backend in BACKENDS.values():
        torch.testing.assert_close(backend(q, k, v), torch.ones_like(q), rtol=0.01, atol=0)


# ---------------------------------------------------------------- names


def test_names_stand_for_kernels() -> None:
    assert attention_kernel("auto") is sdpa_attention
    assert attention_kernel("math") is math_attention
    for entry in ATTENTION_BACKENDS.values():
        assert (imported(entry.backend).attend_lse is not None) == entry.with_lse
    assert resolve_backend("auto") in BACKENDS
    with pytest.raises(ValueError, match="did you mean flash"):
        attention_kernel("flahs")
    files = {file.stem for file in (Path(conf.__file__).parent / "attention").glob("*.yaml")}
    assert files == {"auto", *(name for name in ATTENTION_BACKENDS if ATTENTION_BACKENDS.owner(name) == OURS)}


@pytest.mark.parametrize(
    ("requested", "with_lse", "name"),
    [
        ("auto", False, "torch sdpa"),
        ("auto", True, "torch cpu flash"),
        ("math", True, "math"),
        ("sdpa", False, "torch sdpa"),
        ("flash", False, "torch cpu flash"),
        ("flex", False, "flex, compiled"),
        ("flex", True, "flex, unfused"),
    ],
)
def test_what_runs_on_the_cpu_is_named(
    requested: str, with_lse: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert resolved_name(requested, "cpu", with_lse) == name


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    line = str(error.value)
    assert "\n" not in line
    return line


def test_sage_is_refused_without_its_package_and_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sageattention", None)
    with pytest.raises(ValueError, match="pip install sageattention") as missing:
        resolve_backend("sage")
    assert "attention=sdpa" in one_line(missing)
    monkeypatch.setitem(sys.modules, "sageattention", module("sageattention"))
    assert resolve_backend("sage") == "sage"
    with pytest.raises(NotImplementedError, match="cuda only, not on cpu; use attention=sdpa") as refused:
        resolved_name("sage", "cpu")
    one_line(refused)
    with pytest.raises(NotImplementedError, match="not on cpu"):
        backend_of("sage").attend(*tensors(5, 7, 64, torch.bfloat16))


def test_flash_is_refused_where_it_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotImplementedError, match="not on mps; use attention=sdpa"):
        resolved_name("flash", "mps")
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NotImplementedError, match=r"pip install 'triptych\[flash\]'") as missing:
        resolved_name("flash", "cuda")
    one_line(missing)


def test_flex_is_refused_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NotImplementedError, match="no-such-compiler is not there") as refused:
        resolved_name("flex", "cpu")
    one_line(refused)
    assert resolved_name("flex", "cpu", with_lse=True) == "flex, unfused"


# ---------------------------------------------------------------- packages for CUDA, stood in for


def module(name: str, **functions: object) -> types.ModuleType:
    """Install a fake package of that name with these functions."""
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for attribute, function in functions.items():
        setattr(made, attribute, function)
    return made


@pytest.mark.parametrize(
    ("major", "installed", "name"),
    [
        (9, ("flash_attn_interface", "flash_attn"), "flash-attn 3"),
        (9, ("flash_attn_interface",), "flash-attn 3"),
        (9, ("flash_attn",), "flash-attn 2"),
        (8, ("flash_attn_interface", "flash_attn"), "flash-attn 2"),
        (10, ("flash_attn_interface", "flash_attn"), "flash-attn 2"),
    ],
)
def test_flash_attn_3_on_hopper_else_2(
    monkeypatch: pytest.MonkeyPatch, major: int, installed: tuple[str, ...], name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    for package in ("flash_attn_interface", "flash_attn"):
        there = module(package, flash_attn_func=package, flash_attn_varlen_func=package)
        monkeypatch.setitem(sys.modules, package, there if package in installed else None)
    assert flash_package().name == name


def test_a_package_that_does_not_load_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN2at')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    with pytest.raises(NotImplementedError, match=r"flash-attn 2 is installed but does not load \(undefined symbol"):
        flash_package()


def dense(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, return_attn_probs: bool
) -> tuple[Tensor, Tensor, None]:
    """Return flash-attn's dense function as documented, in float64; without keys its lse is +inf."""
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape[-1] % 8 == 0
    assert q.shape[-1] <= 256
    assert return_attn_probs
    scores = torch.einsum("blhd,bshd->bhls", q.double(), k.double()) * softmax_scale
    out = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v.double())
    return out, scores.logsumexp(-1) if k.shape[1] else torch.full(scores.shape[:-1], math.inf), None


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    return_attn_probs: bool,
) -> tuple[Tensor, Tensor, None]:
    """Return flash-attn's varlen function as documented: every sequence of queries meets its sequence of keys."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q)
    assert cu_seqlens_k[-1] == len(k) == len(v)
    assert cu_seqlens_q.diff().max() <= max_seqlen_q
    assert cu_seqlens_k.diff().max() <= max_seqlen_k
    outs, lses = [], []
    for i in range(len(cu_seqlens_q) - 1):
        own_q, own_k = (slice(int(ends[i]), int(ends[i + 1])) for ends in (cu_seqlens_q, cu_seqlens_k))
        out, lse, _ = dense(
            q[None, own_q], k[None, own_k], v[None, own_k], softmax_scale=softmax_scale, return_attn_probs=True
        )
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1), None


FLASH_ATTN = FlashPackage("flash-attn 2", dense, varlen)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("width", [40, 70, 72, 128, 253])
def test_flash_attn_is_handed_what_it_takes(kind: str, width: int) -> None:
    q, k, v = tensors(5, 19, width, torch.bfloat16)
    mask = mask_of(kind, len(q), 19)
    wanted = exact(q, k, v, mask)
    out, lse = flash_with(FLASH_ATTN, q, k, v, mask)
    torch.testing.assert_close(out, wanted.out_BLHD, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, wanted.lse_BLH, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "width", "line"), [(torch.float32, 64, "16 bit"), (torch.bfloat16, 264, "up to 256")]
)
def test_flash_attn_refuses_what_it_has_not(dtype: torch.dtype, width: int, line: str) -> None:
    with pytest.raises(NotImplementedError, match=line) as refused:
        flash_with(FLASH_ATTN, *tensors(5, 7, width, dtype), None)
    assert "attention=sdpa" in one_line(refused)


def sageattn(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", sm_scale: float = 0.0, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the function of version 2, without its rounding."""
    assert tensor_layout == "NHD"
    assert q.shape[-1] in (64, 128)
    out, lse, _ = dense(q, k, v, softmax_scale=sm_scale, return_attn_probs=True)
    return (out, lse) if return_lse else out


def sageattn_1(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", sm_scale: float = 0.0, **ignored: bool
) -> Tensor:
    """Return the function of version 1, which writes into the keys."""
    out = sageattn(q, k, v, tensor_layout, sm_scale)
    assert isinstance(out, Tensor)
    k -= k.mean(dim=1, keepdim=True)
    return out


SAGE = SagePackage("sageattention 2.2.0", sageattn, returns_lse=True)
SAGE_1 = SagePackage("sageattention 1.0.6", sageattn_1, returns_lse=False)


@pytest.mark.parametrize("package", [SAGE, SAGE_1], ids=lambda package: package.name)
@pytest.mark.parametrize("width", [40, 64, 72, 128])
def test_sage_is_handed_what_it_takes(package: SagePackage, width: int) -> None:
    q, k, v = tensors(5, 19, width, torch.bfloat16)
    before, wanted = k.clone(), exact(q, k, v)
    out, lse = sage_with(package, q, k, v, None, with_lse=package.returns_lse)
    assert torch.equal(k, before)
    torch.testing.assert_close(out, wanted.out_BLHD, rtol=1e-12, atol=1e-12)
    if lse is not None:
        torch.testing.assert_close(lse, wanted.lse_BLH, rtol=1e-12, atol=1e-12)


def test_sage_refuses_what_it_has_not() -> None:
    q, k, v = tensors(5, 7, 64, torch.bfloat16)
    with pytest.raises(NotImplementedError, match="no key mask; use attention=sdpa") as masked:
        sage_with(SAGE, q, k, v, mask_of("tail", len(q), 7), with_lse=False)
    with pytest.raises(NotImplementedError, match=r"1\.0\.6 returns no log-sum-exp") as without:
        sage_with(SAGE_1, q, k, v, None, with_lse=True)
    with pytest.raises(NotImplementedError, match="up to 128, not 160") as wide:
        sage_with(SAGE, *tensors(5, 7, 160, torch.bfloat16), None, with_lse=False)
    with pytest.raises(NotImplementedError, match="not in float32") as single:
        sage_with(SAGE, *tensors(5, 7, 64, torch.float32), None, with_lse=False)
    for error in (masked, without, wide, single):
        one_line(error)


# ---------------------------------------------------------------- on a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GPU = [
    *((name, torch.float32, kind) for name in ("math", "sdpa", "flex") for kind in MASKS),
    *((name, torch.bfloat16, kind) for name in ("math", "sdpa", "flex", "flash") for kind in MASKS),
]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(("backend", "dtype", "kind"), GPU)
@pytest.mark.parametrize(("queries", "keys", "width"), [(129, 130, 40), (33, 1025, 72), (257, 513, 128)])
def test_backends_agree_with_the_reference_on_a_gpu(
    backend: str, dtype: torch.dtype, kind: str, queries: int, keys: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "flash" and not any(map(importlib.util.find_spec, ("flash_attn", "flash_attn_interface"))):
        pytest.skip("flash-attn is not installed")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    q, k, v = tensors(queries, keys, width, dtype)
    mask = mask_of(kind, len(q), keys)
    wanted = exact(q, k, v, mask)
    q, k, v = q.cuda(), k.cuda(), v.cuda()
    mask = None if mask is None else mask.cuda()
    scores = score_dtype(backend, dtype)
    with torch.inference_mode():
        out = backend_of(backend).attend(q, k, v, mask).cpu()
        assert_within(out, wanted.out_BLHD, wanted.out_bound(dtype, scores))
        attend_lse = backend_of(backend).attend_lse
        if attend_lse is not None:
            out, lse = (x.cpu() for x in attend_lse(q, k, v, mask))
            assert_within(out, wanted.out_BLHD, wanted.out_bound(dtype, scores))
            assert_within(lse, wanted.lse_BLH, wanted.lse_bound(dtype, scores))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.skipif(importlib.util.find_spec("sageattention") is None, reason="sageattention is not installed")
@pytest.mark.parametrize("width", [40, 64, 72, 128])
def test_sage_is_near_the_reference_on_a_gpu(width: int) -> None:
    """With eight bits a score the relative error is some percent; a wrong scale or layout would give some tens."""
    q, k, v = tensors(257, 513, width, torch.bfloat16)
    wanted = exact(q, k, v).out_BLHD
    out = backend_of("sage").attend(q.cuda(), k.cuda(), v.cuda()).cpu().double()
    assert ((out - wanted).norm() / wanted.norm()).item() < 0.1
