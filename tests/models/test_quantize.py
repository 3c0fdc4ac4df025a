"""model.quantize: attention's and feed-forward's linears in 8 bits, each weight within half a step of its row's scale.

The rest of the network is unchanged. What cannot be quantised is refused before torchao is imported.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.config.schema import Quantize
from harness.device.flops import count_operations
from harness.resolve.compose import ConfigError, compose_run
from harness.tasks.common.methods import method_class
from harness.tasks.common.references import floor_config, reference_config
from models.checkpoint_source import CheckpointSource
from models.components import Conditioning
from models.pixart import PixArt, load_denoiser
from models.pixart.weights import PLAN
from models.quantize import find_linears, quantize, stored_bytes
from models.registry import REFERENCE
from tests.fixtures.generators import generator
from tests.fixtures.models.parity import rel_l2
from tests.fixtures.packages import pretend

STEPS = 255  # from the negative of a row's largest magnitude to it
SLACK = 1 + 1e-4  # of half a step: float32 rounds up to 127.5 steps in four operations, 4 x 127.5 x 2^-24 of a step


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "torchao", None)
    with pytest.raises(ConfigError, match=r"^model.quantize=fp8 needs the package torchao: pip install 'trip"):
        compose_run(["model.quantize=fp8"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine=diffusers"], "use engine=native"),
        (["task=plan"], "not task=train or plan"),
        (["engine.optimize=eager"], "does not fuse or pack; use engine.optimize=none"),
        (["model=sd15", "model.load=dummy"], "does not go with model=sd15: .* is a U-Net"),
        (["parallel=tp2"], "leave out parallel.tp"),
        (["parallel=ulysses2_sharded"], "parallel.shard_weights=true"),
        (["model.offload=true"], "model.offload=true"),
    ],
    ids=str,
)
def test_what_it_does_not_go_with_is_refused(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    pretend(monkeypatch, "torchao", object())
    with pytest.raises(ConfigError, match=message):
        compose_run(["model.quantize=int8_dynamic", *overrides])


def test_it_is_declared_approximate_and_its_reference_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "torchao", object())
    row = compose_run(["model.quantize=int8_weight_only", "parallel=ulysses2"]).config
    claimed, methods = method_class(row)
    assert (claimed, "8-bit linears" in methods) == ("approximate", True)
    assert {reference_config(row).model.quantize, floor_config(row).model.quantize} == {Quantize.none}


def loaded() -> tuple[PixArt, CheckpointSource]:
    source = CheckpointSource(REFERENCE / "emoji")
    return load_denoiser(source), source


def test_the_plan_names_attention_and_feed_forward() -> None:
    network, _ = loaded()
    found = find_linears(network, PLAN)
    assert len(found) == 10 * network.config.depth, "q, k, v, out of two attentions; up, down"
    assert all(name.startswith("blocks.") for name in found)
    inside = {f"blocks.{name}" for name, part in network.blocks.named_modules() if isinstance(part, nn.Linear)}
    assert set(found) == inside


# ---------------------------------------------------------------- with the package


def outputs(network: nn.Module) -> Tensor:
    numbers = torch.Generator().manual_seed(0)
    latent, text = torch.randn(2, 4, 8, 8, generator=numbers), torch.randn(2, 7, 256, generator=numbers)
    with torch.no_grad():
        return network(latent, torch.tensor([200.0, 900.0]), Conditioning(text))


def test_weights_are_within_half_a_step_and_nothing_else_changes() -> None:
    pytest.importorskip("torchao")
    network, source = loaded()
    plain, before = copy.deepcopy(network), source.loaded["transformer"].bytes
    quantize(network, PLAN, "int8_weight_only", source)
    wanted = {f"{name}.weight" for name in find_linears(network, PLAN)}
    for (name, was), now in zip(plain.named_parameters(), network.parameters(), strict=True):
        if name in wanted:
            step = was.abs().amax(1, keepdim=True) / (STEPS / 2)
            assert ((now.dequantize() - was).abs() <= step / 2 * SLACK).all(), name
        else:
            assert torch.equal(now, was), name
    row = source.loaded["transformer"]
    assert row.dtype.startswith("float32, int8 weights in 60 linears (torchao ")
    saved = sum(3 * was.numel() for name, was in plain.named_parameters() if name in wanted)
    rows = sum(was.shape[0] for name, was in plain.named_parameters() if name in wanted)
    assert before - row.bytes == saved - 4 * rows - rows, "a float32 scale and an int8 zero a row"
    assert stored_bytes(torch.ones(3, dtype=torch.bfloat16)) == 6


def test_the_network_computes_with_its_rounded_weights() -> None:
    pytest.importorskip("torchao")
    network, source = loaded()
    rounded, plain = copy.deepcopy(network), outputs(network)
    quantize(network, PLAN, "int8_weight_only", source)
    for name, linear in find_linears(rounded, PLAN).items():
        linear.weight.data = network.get_submodule(name).weight.dequantize()
    assert rel_l2(outputs(network), outputs(rounded)) < 1e-5
    assert 1e-4 < rel_l2(outputs(network), plain) < 0.05


def test_rounded_inputs_stay_within_their_steps_too() -> None:
    """|y' - y| <= |x| . |w' - w| + |x' - x| . |w'|, each difference at most half a step of its row's scale."""
    pytest.importorskip("torchao")
    from torchao.utils import should_reduce_range

    network, source = loaded()
    plain = copy.deepcopy(network)
    quantize(network, PLAN, "int8_dynamic", source)
    half = 1 / (127 if should_reduce_range(torch.device("cpu")) else STEPS)  # of a step, over the largest magnitude
    x_NC = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    for name in ("blocks.0.self_attention.to_q", "blocks.5.feed_forward.up"):
        linear, was = network.get_submodule(name), plain.get_submodule(name)
        w = was.weight
        off_w, off_x = half * w.abs().amax(1), half * x_NC.abs().amax(1, keepdim=True)
        bound = x_NC.abs().sum(1, keepdim=True) * off_w + off_x * (w.abs().sum(1) + w.shape[1] * off_w)
        with torch.no_grad():
            error = (linear(x_NC) - F.linear(x_NC, w, was.bias)).abs()
        assert (error <= bound * SLACK).all(), name
        assert error.max() > 0, name


def test_operations_are_counted_in_integers_too() -> None:
    found = list[int]()
    with count_operations(found.append):
        torch._int_mm(torch.ones(3, 8, dtype=torch.int8), torch.ones(8, 5, dtype=torch.int8))
    assert found == [2 * 3 * 8 * 5]


def test_fp8_is_refused_on_the_cpu() -> None:
    pytest.importorskip("torchao")
    network, source = loaded()
    with pytest.raises(NotImplementedError, match="fp8 computes on CUDA, and this rank on cpu"):
        quantize(network, PLAN, "fp8", source)


def test_a_record_says_what_ran() -> None:
    pytest.importorskip("torchao")
    with generator("model.quantize=int8_weight_only", "request.prompt=rocket", "request.steps=2") as engine:
        loaded = engine.generate().record.loaded
    (row,) = (part for part in loaded if part.component == "transformer")
    assert "int8 weights in 60 linears (torchao" in row.dtype
    assert row.bytes < 2 * row.parameters
