"""Replaced operators against float64: honest ones are within their bounds, and each planted fault is not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from harness.build.worker import build_worker
from harness.engines.inprocess import InprocessEngine
from harness.messages import GenerationRequest, OperatorError, RankOutcome, RankReport, decode
from harness.optimize import apply, decoder
from harness.optimize.compile_blocks import blocks_of
from harness.optimize.decoder import apply_winograd
from harness.optimize.fuse import fuse_projections
from harness.optimize.operator_check import OperatorCheck
from harness.optimize.prepack import PackedLinear, prepack
from harness.optimize.upcast import UpcastLinear, upcast
from harness.optimize.winograd import WinogradConv2d
from harness.parallel.mesh import RankPosition, degrees
from harness.parallel.parallelize import shard_linears
from harness.resolve.compose import compose_run
from harness.resolve.run import ResolvedRun
from models.attention import math_attention
from models.components import Components, LatentSpace
from models.layers import Modulation
from models.unet.unconditional import UnconditionalPrompts
from tests.fixtures.models.precompute import precompute
from tests.fixtures.models.vae import wide
from tests.fixtures.parallel.networks import TINY
from tests.fixtures.parallel.slices import group_of

CPU, NARROW = torch.device("cpu"), torch.bfloat16
NEEDS_BFLOAT16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN packs bfloat16 from AVX-512 or AVX-NE-CONVERT on"
)
SEEDS = range(20)
FAMILIES = ("flux", "pixart", "dit")


def parts_of(family: str, dtype: torch.dtype = NARROW) -> Components:
    """Return a tiny network, and a decoder with no operators."""
    network = TINY[family].build(math_attention, dtype)
    return Components(network, UnconditionalPrompts, lambda x: x, LatentSpace(4, 4), 8, plan=TINY[family].plan)


def packed(parts: Components) -> None:
    fuse_projections(parts.network, parts.plan)
    for block in blocks_of(parts.network, parts.plan):
        prepack(block)


def upcasted(parts: Components) -> None:
    fuse_projections(parts.network, parts.plan)
    upcast(parts.network)


def errors_of(parts: Components, change: Callable[[Components], None], seed: int = 0) -> list[OperatorError]:
    check = OperatorCheck(CPU, seed=seed)
    parts = check.watch(parts)
    change(parts)
    check.compare_operators()
    return check.errors


def outside(errors: list[OperatorError]) -> set[str]:
    return {row.operator for row in errors if not row.is_within}


@pytest.mark.parametrize("change", [pytest.param(packed, marks=NEEDS_BFLOAT16), upcasted])
@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_linears_are_within_their_bounds(family: str, change: Callable[[Components], None]) -> None:
    for seed in SEEDS:
        errors = errors_of(parts_of(family), change, seed)
        assert len(errors) >= 4
        assert outside(errors) == set()
        assert all(1e-3 < row.rel_l2 < row.bound < 6e-3 for row in errors), "one rounding, and little more"


@NEEDS_BFLOAT16
def test_one_row_stands_for_operators_of_one_kind_and_size() -> None:
    names = [row.operator for row in errors_of(parts_of("flux"), packed)]
    assert names == [
        "PackedLinear 144x48, blocks.*.heads",
        "PackedLinear 48x48, blocks.*.to_out",
        "PackedLinear 192x48, with its activation, blocks.*.feed_forward.up",
        "PackedLinear 48x192, blocks.*.feed_forward.down",
        "PackedLinear 48x240, single_blocks.*.project_out",
    ]


def scaled(forward: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda module, x: forward(module, x) * 1.01


def with_a_head_off(forward: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """Scale the first head of the queries, 12 channels of 144, by 5 %."""

    def planted(module: nn.Module, x: Tensor) -> Tensor:
        y = forward(module, x).float()
        if y.shape[-1] == 144:
            y[..., :12] *= 1.05
        return y.to(x.dtype)

    return planted


def without_bias(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, PackedLinear | UpcastLinear):
            module.bias = None


def with_the_other_gelu(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, PackedLinear) and module.activation[0] == "gelu":
            module.activation = ("gelu", [], "none")


def without_gelu(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, PackedLinear):
            module.activation = ("none", [], "")


@NEEDS_BFLOAT16
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("plant", [scaled, with_a_head_off])
def test_a_planted_scale_of_packed_linears_is_seen(
    plant: Callable[[Callable[..., Tensor]], Callable[..., Tensor]], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedLinear, "forward", plant(PackedLinear.forward))
    errors = errors_of(parts_of("flux"), packed, seed)
    assert len(outside(errors)) == (5 if plant is scaled else 1)


@pytest.mark.parametrize("plant", [scaled, with_a_head_off])
def test_a_planted_scale_of_upcast_linears_is_seen(
    plant: Callable[[Callable[..., Tensor]], Callable[..., Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UpcastLinear, "forward", plant(UpcastLinear.forward))
    errors = errors_of(parts_of("flux"), upcasted)
    linears = {row.operator for row in errors if row.operator.startswith(("UpcastLinear", "WideModulation"))}
    assert outside(errors) == {name for name in linears if plant is scaled or "144x48" in name}


@NEEDS_BFLOAT16
@pytest.mark.parametrize(
    ("plant", "seen"), [(without_bias, 5), (with_the_other_gelu, 1), (without_gelu, 1)], ids=lambda x: str(x)[:25]
)
def test_a_planted_part_of_packed_linears_is_seen(plant: Callable[[nn.Module], None], seen: int) -> None:
    for seed in SEEDS:

        def change(parts: Components) -> None:
            packed(parts)
            plant(parts.network)

        assert len(outside(errors_of(parts_of("flux"), change, seed))) == seen


def test_a_missing_bias_of_upcast_linears_is_seen() -> None:
    def change(parts: Components) -> None:
        upcasted(parts)
        without_bias(parts.network)

    errors = errors_of(parts_of("flux"), change)
    assert outside(errors) == {row.operator for row in errors}
    assert len(errors) > 10


def test_a_missing_bias_is_seen_however_small_it_is() -> None:
    """A thousandth of the products, which rounding them to bfloat16 hides."""
    parts = parts_of("flux")
    for name, parameter in parts.network.named_parameters():
        if name.endswith("bias"):
            parameter.mul_(1e-3)

    def change(parts: Components) -> None:
        upcasted(parts)
        without_bias(parts.network)

    errors = errors_of(parts, change)
    assert outside(errors) == {row.operator for row in errors}


def test_a_gelu_that_no_linear_computes_is_seen() -> None:
    """The activation after an upcast linear is lost."""

    def change(parts: Components) -> None:
        upcasted(parts)
        for module in parts.network.modules():
            if "activation" in module._modules:
                module.activation = nn.Identity()

    assert any(".up" in name for name in outside(errors_of(parts_of("flux"), change)))


def test_linears_sharded_over_ranks_are_compared_as_they_are_on_this_rank() -> None:
    parts = parts_of("flux")
    shard_linears(parts.network, parts.plan, group_of(2, 0))
    errors = errors_of(parts, upcasted)
    assert {"UpcastLinear 72x48, blocks.*.heads", "UpcastRowParallelLinear 48x24, blocks.*.to_out"} <= {
        row.operator for row in errors
    }
    assert outside(errors) == set()


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_linears_whose_output_is_precomputed_are_compared(factor: float) -> None:
    def change(parts: Components) -> None:
        precompute(parts.network, "dit")
        upcast(parts.network)
        for module in parts.network.modules():
            if isinstance(module, Modulation):
                module.weight.mul_(factor)

    errors = errors_of(parts_of("dit"), change)
    found = {row.operator: row.is_within for row in errors if "modulation" in row.operator}
    assert found == {
        "WideModulation 288x48, blocks.*.modulation": factor == 1.0,
        "WideModulation 96x48, head_modulation": factor == 1.0,
    }


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
def test_winograd_convolutions_are_within_their_bounds(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "should_upcast", lambda device, dtype: True)
    narrow = wide()
    narrow.vae.to(dtype)
    parts = parts_of("dit")
    found = errors_of(Components(parts.network, UnconditionalPrompts, narrow, LatentSpace(4, 4), 8), replace_wide)
    assert len([row for row in found if row.operator.startswith("WinogradConv2d")]) == 5
    assert outside(found) == set()
    assert all(row.bound < 1e-5 for row in found) or dtype is NARROW


def replace_wide(parts: Components) -> None:
    assert apply_winograd(parts.decoder, upcast=True)


def test_a_planted_fault_of_winograd_convolutions_is_seen() -> None:
    def change(parts: Components) -> None:
        replace_wide(parts)
        for module in parts.decoder.vae.modules():  # type: ignore[attr-defined]
            if isinstance(module, WinogradConv2d):
                module.filters_ssCK[0, 0] *= 1.01
                if module.step == 1:
                    module.bias = None

    parts = parts_of("dit")
    found = errors_of(Components(parts.network, UnconditionalPrompts, wide(), LatentSpace(4, 4), 8), change)
    assert len(outside(found)) == len(found) == 5


def test_what_is_not_compared_is_said() -> None:
    """Quantized linears; compiled blocks, whose modules run no more, are compared when they are first called."""

    class Quantized(Tensor):
        pass

    def change(parts: Components) -> None:
        upcasted(parts)
        for block in blocks_of(parts.network, parts.plan):
            block.forward = torch.compile(block.forward)  # which compiles nothing before a call

    parts = parts_of("dit")
    linear = parts.network.get_submodule("project_out")
    linear.weight = nn.Parameter(linear.get_parameter("weight").as_subclass(Quantized), requires_grad=False)
    check = OperatorCheck(CPU)
    parts = check.watch(parts)
    change(parts)
    check.compare_operators()
    assert check.notes() == ("not compared with float64: 8-bit linears",)
    assert {row.operator.split(", ")[1] for row in check.errors} == {"patch_embed", "head_modulation"}


def test_weights_that_wait_on_the_cpu_are_not_compared() -> None:
    check = OperatorCheck(torch.device("cuda"))
    parts = check.watch(parts_of("dit"))
    upcasted(parts)
    check.compare_operators()
    assert check.errors == []
    assert check.not_compared == ["weights that are not on the device yet"]


def test_nothing_is_compared_unless_it_is_enabled() -> None:
    check = OperatorCheck(CPU, enabled=False)
    parts = parts_of("dit")
    assert check.watch(parts) is parts
    upcasted(parts)
    check.compare_operators()
    check.compare_attention("sdpa", False, parts.plan, NARROW)
    assert (check.errors, check.notes()) == ([], ())


def report_of(*overrides: str) -> RankReport:
    """Return what a rank reports of its first request."""
    config = compose_run(["model=emoji", *overrides]).config
    worker = build_worker(ResolvedRun(config), RankPosition(0, degrees(config.parallel)), CPU)
    request = GenerationRequest("a", ["rocket"], steps=1, guidance=1.0, height=32, width=32)
    outcome = decode(worker.generate(request, lambda *progress: None, lambda: False))
    assert isinstance(outcome, RankOutcome)
    assert outcome.report is not None
    return outcome.report


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("slow", [True, pytest.param(False, marks=NEEDS_BFLOAT16)])
def test_a_rank_that_measures_fidelity_compares_its_operators(
    slow: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the text encoder too, whenever it is loaded, with and without instructions for bfloat16."""
    monkeypatch.setattr(apply, "should_upcast", lambda device, dtype: slow)
    monkeypatch.setattr(apply, "should_prepack", lambda device, dtype: not slow)
    rows = report_of("task=bench", "model.dtype=bfloat16", f"model.text.keep_loaded={kept}").operator_errors
    kinds = {row.operator.split(" ")[0] for row in rows}
    assert kinds == ({"UpcastLinear", "UpcastConv2d", "attention"} if slow else {"PackedLinear", "attention"})
    assert any("encoder" in row.operator for row in rows) == slow
    assert outside(rows) == set()


def test_the_time_is_not_part_of_loading_and_is_noted_if_it_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def take_long(check: OperatorCheck, *arguments: object) -> None:
        check.duration_ms += 1e9

    monkeypatch.setattr(OperatorCheck, "compare_attention", take_long)
    config = compose_run(["model=emoji", "launch.mode=inprocess", "launch.threads_per_rank=1", "task=bench"]).config
    engine = InprocessEngine(config)
    try:
        assert engine.start(lambda info: None).load_ms < 0
    finally:
        engine.stop()
    assert any(note.startswith("operators were compared with float64 in 10") for note in report_of("task=bench").notes)


@pytest.mark.parametrize("overrides", [["task=generate"], ["task=bench", "task.fidelity=false"]])
def test_a_rank_that_measures_no_fidelity_compares_nothing(overrides: list[str]) -> None:
    assert report_of("model.dtype=bfloat16", *overrides).operator_errors == []
