"""bfloat16 products in float32: exact products, rounded once, in every layer that has any."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn

from harness.config.optimize import EagerConfig, Optimize
from harness.config.schema import EngineConfig
from harness.optimize.apply import optimize
from harness.optimize.decoder import apply_winograd
from harness.optimize.upcast import FEW_ROWS, should_upcast, upcast
from harness.optimize.winograd import WinogradConv2d
from harness.parallel.group import Group, single_process_group
from harness.parallel.parallelize import ColumnParallelLinear, RowParallelLinear
from harness.parallel.vae import HaloConv2d, HaloConv3d
from models.attention import math_attention, sdpa_attention
from models.components import Components, LatentSpace
from models.layers import Modulation
from models.unet.unconditional import UnconditionalPrompts
from tests.fixtures.models.parity import randomize, rel_l2
from tests.fixtures.models.vae import wide
from tests.fixtures.parallel.networks import TINY
from tests.fixtures.products import Products

CPU, NARROW = torch.device("cpu"), torch.bfloat16


@contextmanager
def products_of() -> Iterator[list[torch.dtype]]:
    with torch.inference_mode(), Products() as seen:
        yield seen.dtypes


def first(size: int) -> Group:
    """Return the first of several ranks that are not connected."""
    return Group(range(size), 0, None, single_process_group().traffic)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(48, 40), (3, 11, 48)),
    "linear without bias": (lambda: nn.Linear(48, 40, bias=False), (9, 48)),
    "modulation": (lambda: Modulation(48, 96, silu=False), (8, 48)),
    "column": (lambda: ColumnParallelLinear(nn.Linear(48, 40), first(2)), (3, 11, 48)),
    "row": (lambda: RowParallelLinear(nn.Linear(48, 40, bias=False), single_process_group()), (3, 11, 48)),
    "1d": (lambda: nn.Conv1d(12, 10, 3), (2, 12, 40)),
    "2d": (lambda: nn.Conv2d(12, 10, 3, stride=2, padding=1), (2, 12, 15, 17)),
    "causal": (lambda: WanCausalConv3d(12, 10, 3, padding=1), (2, 12, 4, 6, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_rounds_exact_products_once(name: str) -> None:
    make, shape = LAYERS[name]
    narrow = make().to(NARROW).requires_grad_(False)
    randomize(narrow)
    exact, mine, x = copy.deepcopy(narrow).double(), copy.deepcopy(narrow), torch.randn(shape).to(NARROW)
    assert upcast(mine) == 1
    assert isinstance(mine, type(narrow))
    assert mine.state_dict().keys() == narrow.state_dict().keys()
    assert mine.get_parameter("weight").dtype is NARROW
    assert upcast(mine) == 0, "it is done"
    with products_of() as dtypes:
        made = mine(x)
    assert set(dtypes) == {torch.float32}
    assert made.dtype is NARROW
    wanted = exact(x.double())
    assert ((made.double() - wanted).abs() / (wanted.abs() + 1e-2)).max() < 2**-8 * 1.05
    assert rel_l2(made.float(), narrow(x).float()) < 2**-8


def test_few_rows_are_multiplied_as_they_are() -> None:
    linear, x = nn.Linear(32, 16).to(NARROW).requires_grad_(False), torch.randn(FEW_ROWS - 1, 32).to(NARROW)
    plain = linear(x)
    upcast(linear)
    assert torch.equal(linear(x), plain)


def test_other_weights_stay_as_they_are() -> None:
    """Layers in float32, and layers with a class of their own, as quantised ones have."""

    class Quantised(Tensor):
        pass

    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=NARROW), nn.LayerNorm(8, dtype=NARROW))
    network[1].weight = nn.Parameter(network[1].weight.detach().as_subclass(Quantised), requires_grad=False)
    kinds = [type(module) for module in network]
    assert upcast(network) == 0
    assert [type(module) for module in network] == kinds


@pytest.mark.parametrize("name", list(TINY))
def test_no_product_of_a_network_is_left_narrow(name: str) -> None:
    """The output stays as near to float32's as before."""
    latent, tau_B, condition = TINY[name].inputs
    exact = TINY[name].build(sdpa_attention)
    plain, network = TINY[name].build(sdpa_attention, NARROW), TINY[name].build(sdpa_attention, NARROW)
    low = latent.to(NARROW), tau_B, condition.to(NARROW)
    with products_of() as before:
        theirs = plain(*low)
    assert NARROW in before
    assert upcast(network) > 0
    with products_of() as dtypes:
        mine = network(*low)
    assert len(dtypes) == len(before)
    assert set(dtypes) == {torch.float32}
    with torch.inference_mode():
        truth = exact(latent, tau_B, condition)
    assert rel_l2(mine.float(), truth) < 1.2 * rel_l2(theirs.float(), truth)


def test_a_decoder_is_widened_with_fewer_products_too() -> None:
    decoder, latent = wide(), torch.randn(2, 4, 5, 6)
    with torch.inference_mode():
        truth = decoder(latent)
        decoder.vae.to(NARROW)
        theirs = decoder(latent)
    assert not apply_winograd(decoder)
    assert upcast(decoder.vae) > 20
    assert apply_winograd(decoder, upcast=True) == should_upcast(CPU, NARROW)
    with products_of() as dtypes:
        mine = decoder(latent)
    assert set(dtypes) == {torch.float32}
    assert rel_l2(mine, truth) < 1.2 * rel_l2(theirs, truth)


@pytest.mark.parametrize("on", [True, False])
def test_the_decoder_is_widened_with_the_network(on: bool) -> None:
    network, decoder = TINY["dit"].build(math_attention, NARROW), wide()
    decoder.vae.to(NARROW)
    parts = Components(network, UnconditionalPrompts, decoder, LatentSpace(4, 4), 8, plan=TINY["dit"].plan)
    engine = EngineConfig(optimize=Optimize.eager, eager=EagerConfig(upcast=on))
    made = optimize(parts, engine, CPU, NARROW)
    slow = should_upcast(CPU, NARROW)
    assert ("products in float32" in made.notes[0]) == ("Winograd" in made.notes[0]) == (on and slow)
    with products_of() as dtypes:
        made.decoder(torch.randn(1, 4, 2, 3))
    assert (set(dtypes) == {torch.float32}) == (on and slow)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_fewer_products_of_bfloat16_are_rounded_once(step: int) -> None:
    conv = nn.Conv2d(24, 10, 3, padding=1).to(NARROW).requires_grad_(False)
    randomize(conv)
    x_BCHW = torch.randn(2, 24, 9, 7).to(NARROW).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        made = WinogradConv2d(conv, step)(x_BCHW)
        upsampled = nn.functional.interpolate(x_BCHW.double(), scale_factor=2.0) if step == 1 else x_BCHW.double()
        wanted = copy.deepcopy(conv).double()(upsampled)
    assert made.dtype is NARROW
    assert made.stride(1) == 1, "the channels are innermost"
    assert ((made.double() - wanted).abs() / (wanted.abs() + 1e-2)).max() < 2**-8 * 1.05


class Edge(Group):
    """Return a rank whose neighbours hold zeros."""

    def exchange_halos(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(first), torch.zeros_like(last)


@pytest.mark.parametrize("name", ["2d", "causal"])
def test_a_convolution_of_a_band_is_widened_with_its_own(name: str) -> None:
    edge = Edge(range(2), 0, None, single_process_group().traffic)
    if name == "2d":
        conv: nn.Module = nn.Conv2d(6, 4, 3, padding=1, dtype=NARROW)
        x, make = torch.randn(2, 6, 5, 7, dtype=NARROW), HaloConv2d
    else:
        conv, make = WanCausalConv3d(6, 4, 3, padding=1).to(NARROW), HaloConv3d  # type: ignore[assignment]
        x = torch.randn(2, 6, 3, 5, 7, dtype=NARROW)
    conv.requires_grad_(False)
    upcast(conv)
    sharded = make(conv, edge)  # type: ignore[arg-type]
    with products_of() as dtypes:
        assert torch.equal(sharded(x), conv(x))
    assert set(dtypes) == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_blocks_are_widened(frozen: bool) -> None:
    from harness.config.optimize import CompileConfig
    from harness.optimize.compile_blocks import blocks_of, compile_forwards

    tiny = TINY["dit"]
    exact, plain, network = (tiny.build(math_attention, dtype) for dtype in (torch.float32, NARROW, NARROW))
    latent, tau_B, condition = tiny.inputs
    low = latent.to(NARROW), tau_B, condition.to(NARROW)
    upcast(network)
    compile_forwards(blocks_of(network, tiny.plan), CompileConfig(freezing=frozen), CPU)
    with torch.inference_mode():
        truth = exact(latent, tau_B, condition)
        assert rel_l2(network(*low).float(), truth) < 1.2 * rel_l2(plain(*low).float(), truth)
    torch._inductor.config.freezing = False
