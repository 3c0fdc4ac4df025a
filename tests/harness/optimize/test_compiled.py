"""engine.optimize=compile: one graph for each kind of block, and the plain network's numbers, at every size."""

import pytest
import torch
from torch._dynamo.utils import counters

from harness.config.optimize import CompileConfig
from harness.device.flops import count_operations
from harness.optimize.compile_blocks import blocks_of, compile_forwards
from harness.optimize.fuse import fuse_projections
from models.attention import sdpa_attention
from tests.fixtures.models.parity import rel_l2
from tests.fixtures.models.precompute import precompute
from tests.fixtures.parallel.networks import TINY

BOUND = 1e-5
KINDS = {"pixart": 1, "dit": 1, "sd3": 3, "flux": 2, "qwen_image": 1, "z_image": 3, "wan": 1}
"""Kinds of blocks: SD3's with a second attention, without it, and the last; FLUX's double and single ones; Z-Image's
for the image, for the text and for both.
"""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Set the folder where graphs are kept, with the headers that all of them include."""
    return str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(autouse=True)
def _own_graphs(graphs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", graphs)
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TINY))
def test_blocks_share_a_graph_and_give_the_plain_numbers(name: str) -> None:
    tiny = TINY[name]
    plain, network = tiny.build(sdpa_attention), tiny.build(sdpa_attention)
    modulation_cache = precompute(network, name)
    fuse_projections(network, tiny.plan)
    assert compile_forwards(blocks_of(network, tiny.plan), CompileConfig(), CPU) == "compiled"
    latent, _, condition = tiny.inputs
    with torch.inference_mode():
        precomputed = modulation_cache.for_batch(condition, [700.0, 20.0])
        for tau in (700.0, 20.0, 333.0):
            tau_B = torch.full((len(latent),), tau)
            assert rel_l2(network(latent, tau_B, precomputed.at(latent, tau)), plain(latent, tau_B, condition)) < BOUND
        assert counters["stats"]["unique_graphs"] == KINDS[name]
        for width in (6, 8, 12, 16):
            other, tau_B = latent[..., :width].repeat(1, *[1] * (latent.ndim - 2), 2), torch.full((len(latent),), 5.0)
            other = other[..., :width]
            assert (
                rel_l2(
                    network(other, tau_B, modulation_cache.for_batch(condition, []).at(other, 5.0)),
                    plain(other, tau_B, condition),
                )
                < BOUND
            )
        assert counters["stats"]["unique_graphs"] <= 2 * KINDS[name]


@pytest.mark.slow
def test_frozen_blocks_give_the_plain_numbers() -> None:
    tiny = TINY["dit"]
    plain, network = tiny.build(sdpa_attention), tiny.build(sdpa_attention)
    assert compile_forwards(blocks_of(network, tiny.plan), CompileConfig(freezing=True), CPU) == "compiled, frozen"
    with torch.inference_mode():
        assert rel_l2(network(*tiny.inputs), plain(*tiny.inputs)) < BOUND
    torch._inductor.config.freezing = False


def test_what_is_counted_first_is_compiled_all_the_same() -> None:
    compiled, x, found = torch.compile(torch.nn.Linear(4, 4).forward, backend="eager"), torch.ones(2, 4), list[int]()
    with torch.inference_mode():
        with count_operations(found.append):
            compiled(x)
        assert found == [2 * 2 * 4 * 4]
        assert counters["stats"]["unique_graphs"] == 0
        compiled(x)
    assert counters["stats"]["unique_graphs"] == 1


def test_what_a_machine_lacks_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotImplementedError, match="needs a GPU"):
        compile_forwards([], CompileConfig(cuda_graphs=True), CPU)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotImplementedError, match=r"C\+\+ compiler"):
        compile_forwards([], CompileConfig(), CPU)
