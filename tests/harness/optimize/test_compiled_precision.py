"""Compiled blocks against float64: honest graphs are within their bounds, and a planted fault is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.config.optimize import CompileConfig
from harness.device.flops import count_operations
from harness.messages import OperatorError
from harness.optimize.compile_blocks import blocks_of, compile_forwards
from harness.optimize.compiled_precision import check_compiled, map_tensors
from harness.optimize.operator_check import OperatorCheck
from models.attention import sdpa_attention
from models.components import Conditioning
from tests.fixtures.parallel.networks import TINY

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
KINDS = {"pixart": 1, "dit": 1, "sd3": 3, "flux": 2, "qwen_image": 1, "z_image": 2, "wan": 1}
"""Kinds of blocks by class and sizes; the two stacks of Z-Image over the image are of one kind."""


def network_in(name: str, dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
    tiny = TINY[name]
    inputs = map_tensors(tiny.inputs, lambda x: x.to(dtype) if x.is_floating_point() else x)
    return tiny.build(sdpa_attention, dtype), inputs


def compiled_rows(
    name: str, dtype: torch.dtype, change: Callable[[Tensor], Tensor] | None = None
) -> list[OperatorError | str]:
    """Return the rows of a network whose blocks' forwards are changed as a wrong graph would."""
    network, inputs = network_in(name, dtype)
    found: list[OperatorError | str] = []
    for block in blocks_of(network, TINY[name].plan):
        plain = block.forward
        block.forward = lambda *a, _plain=plain, **k: map_tensors(_plain(*a, **k), change or torch.clone)
    check_compiled(blocks_of(network, TINY[name].plan), found.append)
    with torch.inference_mode():
        network(*inputs)
        network(*inputs)
    return found


@BOTH
@pytest.mark.parametrize("name", list(TINY))
def test_each_kind_of_block_is_compared_once(name: str, dtype: torch.dtype) -> None:
    rows = compiled_rows(name, dtype)
    assert len(rows) == KINDS[name]
    assert all(isinstance(row, OperatorError) and 0 <= row.rel_l2 <= row.bound for row in rows)
    bounds = [row.bound for row in rows if isinstance(row, OperatorError)]
    assert max(bounds) == 1e-5 if dtype is torch.float32 else max(bounds) < 0.05


@BOTH
@pytest.mark.parametrize("name", ["dit", "flux", "sd3"])
def test_a_fault_of_a_graph_is_seen(name: str, dtype: torch.dtype) -> None:
    wrong = 1.0001 if dtype is torch.float32 else 1.05
    rows = compiled_rows(name, dtype, lambda x: x * wrong)
    assert rows
    assert all(isinstance(row, OperatorError) and row.rel_l2 > row.bound for row in rows)


def test_operations_that_are_counted_are_not_those_of_the_comparison() -> None:
    network, inputs = network_in("dit", torch.float32)
    counts, found = list[int](), list[OperatorError | str]()
    with torch.inference_mode():
        with count_operations(counts.append):
            network(*inputs)
        compile_forwards(blocks_of(network, TINY["dit"].plan), CompileConfig(), CPU)
        check_compiled(blocks_of(network, TINY["dit"].plan), found.append)
        with count_operations(counts.append):
            network(*inputs)
    assert counts[0] == counts[1]
    assert found == []


def test_what_has_no_float64_is_left_out() -> None:
    class Block(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype is torch.float64:
                raise NotImplementedError("no kernel")
            return super().forward(x)

    block, found = Block(4, 4), list[OperatorError | str]()
    block.forward = block.forward  # type: ignore[method-assign]
    check_compiled([block], found.append)
    block(torch.ones(2, 4))
    assert found == ["compiled Block (no kernel)"]


def test_tensors_inside_of_a_condition_are_changed() -> None:
    condition = Conditioning(torch.ones(1, 2, 3))
    changed = map_tensors((condition, {"a": [torch.ones(1)]}, "b"), torch.zeros_like)
    assert float(changed[0].prompt_embeds.sum()) == 0 == float(changed[1]["a"][0])
    assert changed[2] == "b"


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("name", list(TINY))
def test_compiled_blocks_are_within_their_bounds(
    name: str, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
    torch._dynamo.reset()
    network, inputs = network_in(name, dtype)
    check = OperatorCheck(CPU)
    check._watch_network(network)
    compile_forwards(blocks_of(network, TINY[name].plan), CompileConfig(), CPU)
    with torch.inference_mode():
        check.compare_operators()
        assert not any(row.operator.startswith("compiled") for row in check.errors)
        network(*inputs)
    rows = [row for row in check.errors if row.operator.startswith("compiled")]
    assert len(rows) == KINDS[name]
    assert all(row.rel_l2 <= row.bound for row in rows)
    assert check.notes() == ()
