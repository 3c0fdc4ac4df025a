"""Attention kernels against float64: honest ones are within their bounds, and each planted fault is not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from harness.messages import OperatorError
from harness.optimize.attention_precision import attention_sizes, lse_errors, output_error, random_inputs, takes_mask
from harness.optimize.operator_check import OperatorCheck
from models.attention import BACKENDS, AttentionKernel, lse_kernel, math_attention, resolved_name, table
from models.attention.backend import Backend
from models.attention.lse import WITH_LSE
from models.components import Components, LatentSpace
from models.unet.unconditional import UnconditionalPrompts
from tests.fixtures.parallel.networks import TINY

CPU, NARROW = torch.device("cpu"), torch.bfloat16
SEEDS = range(20)
SIZES = [(4, 12), (3, 72)]


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize("name", list(BACKENDS))
def test_attention_kernels_are_within_their_bounds(name: str, dtype: torch.dtype) -> None:
    for seed in SEEDS:
        for heads, channels in SIZES:
            for masked in (False, True):
                inputs = random_inputs(heads, channels, dtype, CPU, masked, seed)
                row = output_error(resolved_name(name, "cpu"), BACKENDS[name], inputs)
                assert row.is_within, row
                assert row.bound < (2e-5 if dtype is torch.float32 else 6e-3)


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize("name", list(WITH_LSE))
def test_kernels_of_a_ring_are_within_their_bounds(name: str, dtype: torch.dtype) -> None:
    for seed in SEEDS:
        for masked in (False, True):
            inputs = random_inputs(4, 12, dtype, CPU, masked, seed)
            rows = lse_errors(resolved_name(name, "cpu", True), lse_kernel(name), inputs)
            assert all(row.is_within for row in rows), rows


def with_scale(kernel: AttentionKernel) -> AttentionKernel:
    return lambda q, k, v, mask=None: kernel(q.float() * 1.01, k.float(), v.float(), mask).to(q.dtype)


def with_output_scale(kernel: AttentionKernel) -> AttentionKernel:
    return lambda q, k, v, mask=None: (kernel(q, k, v, mask).float() * 1.01).to(q.dtype)


def with_a_head_off(kernel: AttentionKernel) -> AttentionKernel:
    def planted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        out_BLHD = kernel(q, k, v, mask).float()
        out_BLHD[:, :, 1] *= 1.05
        return out_BLHD.to(q.dtype)

    return planted


def without_mask(kernel: AttentionKernel) -> AttentionKernel:
    return lambda q, k, v, mask=None: kernel(q, k, v, None)


PLANTS = (with_scale, with_output_scale, with_a_head_off, without_mask)


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize("name", list(BACKENDS))
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_seen(
    plant: Callable[[AttentionKernel], AttentionKernel], name: str, dtype: torch.dtype
) -> None:
    for seed in SEEDS:
        inputs = random_inputs(4, 12, dtype, CPU, True, seed)
        row = output_error(resolved_name(name, "cpu"), plant(BACKENDS[name]), inputs)
        assert not row.is_within, row


def test_one_head_of_many_off_by_a_percent_is_seen() -> None:
    """Over all heads together it is less than rounding."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        factor_H1 = torch.tensor([1.01] + [1.0] * 15)[:, None]
        return (math_attention(q, k, v, mask).float() * factor_H1).to(q.dtype)

    for seed in SEEDS:
        assert not output_error("math", kernel, random_inputs(16, 12, NARROW, CPU, False, seed)).is_within


def test_a_log_sum_exp_of_another_scale_is_seen() -> None:
    kernel = lse_kernel("flash")
    for seed in SEEDS:
        inputs = random_inputs(4, 12, NARROW, CPU, False, seed)
        rows = lse_errors(
            "torch cpu flash", lambda q, k, v, mask=None: kernel((1.01 * q.float()).to(q.dtype), k, v), inputs
        )
        assert not rows[1].is_within


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_is_outside(value: float) -> None:
    inputs = random_inputs(4, 12, NARROW, CPU, False, 0)
    row = output_error("torch sdpa", lambda q, k, v, mask=None: torch.full_like(q, value), inputs)
    assert (row.rel_l2, row.is_within) == (1.0, False)


@pytest.mark.parametrize("name", list(TINY))
def test_the_heads_and_masks_are_the_networks_own(name: str) -> None:
    seen: set[tuple[int, int]] = set()
    masks: set[bool] = set()

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        seen.add((q.shape[2], q.shape[3]))
        masks.add(mask is not None)
        return math_attention(q, k, v, mask)

    network = TINY[name].build(kernel)
    with torch.inference_mode():
        network(*TINY[name].inputs)
    assert set(attention_sizes(network)) == seen
    assert takes_mask(TINY[name].plan) == (True in masks)


def errors_of(name: str, backend: str, with_lse: bool) -> tuple[list[OperatorError], list[str]]:
    tiny = TINY[name]
    parts = Components(
        tiny.build(math_attention, NARROW), UnconditionalPrompts, lambda x: x, LatentSpace(4, 4), 8, plan=tiny.plan
    )
    check = OperatorCheck(CPU)
    check.watch(parts)
    check.compare_attention(backend, with_lse, parts.plan, NARROW)
    return check.errors, check.not_compared


@pytest.mark.parametrize(
    ("name", "with_lse", "wanted"),
    [
        ("dit", False, [""]),
        ("qwen_image", False, ["", ", masked"]),
        ("dit", True, [", for a ring", ", for a ring, log-sum-exp"]),
        ("wan", True, [", for a ring", ", for a ring, log-sum-exp", ""]),  # its cross-attention stays out of the ring
    ],
)
def test_the_kernels_that_a_layout_uses_are_compared(name: str, with_lse: bool, wanted: list[str]) -> None:
    errors, _ = errors_of(name, "flash", with_lse)
    assert [row.operator for row in errors] == [f"attention (torch cpu flash), 4 heads of 12{part}" for part in wanted]
    assert all(row.is_within for row in errors)


def test_a_kernel_that_cannot_run_here_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        raise NotImplementedError("it computes in 16 bit")

    monkeypatch.setattr("models.attention.sdpa.SDPA", Backend(refuse, None, lambda device, with_lse: "refusing"))
    assert errors_of("dit", "sdpa", False) == ([], ["attention (it computes in 16 bit)"])
    monkeypatch.setattr("models.attention.sage.SAGE", Backend(refuse, None, lambda device, with_lse: "sageattention 2"))
    monkeypatch.setattr(table, "resolve_backend", lambda name, *rest: name)
    assert errors_of("dit", "sage", False) == ([], ["approximate attention (sageattention 2)"])
