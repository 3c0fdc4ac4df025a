"""A recorded and replayed evaluation gives what the plain network gives."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.build.native import replay_support
from harness.config.optimize import Optimize
from harness.config.schema import EngineConfig
from harness.device.flops import count_operations
from harness.device.profile import profile_operators
from harness.optimize import apply
from harness.optimize import graphs as graphs_module
from harness.optimize.apply import ReplaySupport, optimize
from harness.optimize.graphs import (
    MAX_DECODED_PIXELS,
    MAX_GRAPHS,
    RecordedDecoder,
    RecordedNetwork,
    cuda_graph_recorder,
)
from harness.parallel.process_groups import single_rank_groups
from harness.resolve.compose import ConfigError, compose_run
from harness.tasks.common.session import MeasurementSession
from models.attention import sdpa_attention
from models.components import Components, Conditioning, LatentSpace
from models.decoders import KLDecoder
from models.layers import cached_tensor, collect_cached_tensors
from models.pixart.network import SizeEmbedding
from models.unet.network import ConditionalUNet, SizeConditionedUNet, UnconditionalUNet, capturable
from tests.fixtures.models.parity import rel_l2
from tests.fixtures.models.precompute import TAUS, precompute
from tests.fixtures.models.unet import NCSNPP, PLAIN, POOLED, SIZED, SMALL, TEXT
from tests.fixtures.parallel.networks import TINY, Inputs


class Again:
    """Replaces a graph: runs the same function once more, and writes to the output's place."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self.run = run
        self.output = run()

    def replay(self) -> None:
        self.output.copy_(self.run())


class Once(Again):
    """Overwrite what must not be read again."""

    def replay(self) -> None:
        pass


class Recorder:
    """Makes graphs and records them."""

    def __init__(self) -> None:
        self.made: list[Again] = []

    def __call__(self, run: Callable[[], Tensor]) -> Again:
        self.made.append(Again(run))
        return self.made[-1]


class Counting(nn.Module):
    """A network that does almost nothing; it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, latent: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        self.runs += 1
        return latent @ latent.mT + tau_B[:, None, None]


def moved(inputs: Inputs, device: str) -> Inputs:
    latent, tau_B, condition = inputs
    tensors = {f.name: getattr(condition, f.name) for f in fields(Conditioning)}
    on_device = {name: None if x is None else x.to(device) for name, x in tensors.items()}
    return latent.to(device), tau_B.to(device), Conditioning(**on_device)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", list(TINY))
def test_a_replay_reads_what_it_is_handed(name: str) -> None:
    """With precomputed modulation, at other times and for other latents; earlier outputs stay unchanged."""
    latent, _, condition = TINY[name].inputs
    plain, network = TINY[name].build(sdpa_attention), TINY[name].build(sdpa_attention)
    request = precompute(network, name).for_batch(condition, TAUS)
    graphs, found, expected = RecordedNetwork(network, Again), [], []
    for n, tau in enumerate([*TAUS, TAUS[0]]):
        fed, tau_B = latent * (1 + n), torch.full((len(latent),), tau)
        found.append(graphs(fed, tau_B, request.at(fed, tau)))
        expected.append(plain(fed, tau_B, condition))
    assert all(rel_l2(mine, other) < 1e-5 for mine, other in zip(found, expected, strict=True))


def test_a_kind_is_run_then_recorded_then_replayed() -> None:
    record = Recorder()
    graphs = RecordedNetwork(Counting(), record)
    for sizes, recorded in (([2, 2, 2], 1), ([3], 1), ([2, 3, 3], 2)):
        for rows in sizes:
            x, tau_B = torch.rand(rows, 4, 4), torch.rand(rows)
            assert torch.equal(graphs(x, tau_B, Conditioning()), x @ x.mT + tau_B[:, None, None])
        assert len(record.made) == recorded
    assert graphs(x.double(), tau_B, Conditioning()).dtype is torch.float64
    graphs(x, tau_B, Conditioning(scale=tau_B))
    assert len(record.made) == 2  # of another dtype, and with another precomputed conditioning


def test_the_graphs_of_the_last_kinds_are_kept() -> None:
    record = Recorder()
    graphs = RecordedNetwork(Counting(), record)

    def generate(side: int) -> None:
        graphs(torch.rand(1, side, side), torch.rand(1), Conditioning())

    for side in range(1, MAX_GRAPHS + 1):
        generate(side), generate(side)
    generate(1)  # so that 2 is the least recently used
    generate(MAX_GRAPHS + 1), generate(MAX_GRAPHS + 1)
    assert len(record.made) == MAX_GRAPHS + 1
    generate(1), generate(1), generate(MAX_GRAPHS + 1)
    assert len(record.made) == MAX_GRAPHS + 1
    generate(2), generate(2)
    assert len(record.made) == MAX_GRAPHS + 2


@pytest.mark.parametrize("watch", [count_operations, profile_operators])
def test_what_is_watched_is_run(watch: Any) -> None:
    network = Counting()
    graphs = RecordedNetwork(network, Once)
    x, tau_B = torch.rand(2, 8, 8), torch.rand(2)
    for _ in range(2):
        graphs(x, tau_B, Conditioning())
    runs, seen = network.runs, list[Any]()
    with watch(seen.append):
        graphs(x, tau_B, Conditioning())
    assert network.runs == runs + 1
    assert seen == [2 * 2 * 8**3] or any(row.name == "aten::bmm" for row in seen[0])


def test_tables_live_as_long_as_what_reads_them() -> None:
    table = cached_tensor(lambda side: torch.zeros(side))
    with collect_cached_tensors() as held:
        first = table(1)
        assert table(2) is table(2)
    table(3)
    assert [len(t) for t in held] == [1, 2, 2]
    assert held[0] is first


class OneDevice(TorchDispatchMode):
    """Reports operations that read or make a tensor elsewhere; one that waits for a value fails on `meta`."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.seen, self.elsewhere = 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.seen += 1
        tensors = [x for x in tree_leaves((args, kwargs, made)) if isinstance(x, Tensor)]
        self.elsewhere += [str(func) for x in tensors if x.device.type != self.device]
        return made


def stays(run: Callable[[], Tensor]) -> bool:
    """Return whether a run on known sizes stays on the device `meta`."""
    run()
    with OneDevice("meta") as watched:
        run()
    assert watched.seen > 20
    return not watched.elsewhere


@pytest.mark.parametrize("modulation_cache", [True, False])
@pytest.mark.parametrize("name", list(TINY))
def test_an_evaluation_of_known_sizes_stays_on_its_device(name: str, modulation_cache: bool) -> None:
    """A recording may not read the CPU's memory: every transformer, with and without precomputed modulation."""
    latent, tau_B, condition = moved(TINY[name].inputs, "meta")
    network = TINY[name].build(sdpa_attention).to("meta")
    if modulation_cache:
        condition = precompute(network, name).for_batch(condition, TAUS).at(latent, TAUS[0])
    assert stays(lambda: network(latent, tau_B, condition))


def test_the_size_that_pixart_gets_stays_on_its_device() -> None:
    sizes, like = SizeEmbedding(48).to("meta"), torch.empty(1, device="meta")
    assert stays(lambda: sizes(64, 32, like))


UNETS = {
    "sd": (ConditionalUNet(UNet2DConditionModel(**SMALL)), True),
    "sdxl": (SizeConditionedUNet(UNet2DConditionModel(**SIZED), 8), True),
    "ddpm": (UnconditionalUNet(UNet2DModel(**PLAIN)), True),
    "ncsn++": (UnconditionalUNet(UNet2DModel(**NCSNPP)), False),
}


@pytest.mark.parametrize("name", list(UNETS))
def test_a_unet_is_recordable_where_it_stays_on_its_device(name: str) -> None:
    network, expected = UNETS[name]
    network = network.to("meta")
    latent = torch.empty(2, network.unet.config.in_channels, 16, 16, device="meta")
    tau_B, prompt_embeds = torch.empty(2, device="meta"), torch.empty(2, 7, TEXT, device="meta")
    condition = Conditioning(prompt_embeds=prompt_embeds, pooled=torch.empty(2, POOLED, device="meta"))
    assert stays(lambda: network(latent, tau_B, condition)) is expected
    assert capturable(network) is expected


def vae() -> KLDecoder:
    channels = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    scaled = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    made: AutoencoderKL = AutoencoderKL(**channels, **blocks, **scaled).eval()  # type: ignore[arg-type]
    return KLDecoder(made)


def test_a_decoder_is_replayed_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, record = vae(), Recorder()
    monkeypatch.setattr(graphs_module, "MAX_DECODED_PIXELS", 2 * 16**2)
    recorded = RecordedDecoder(decoder, record)
    for latents in (torch.rand(3, 2, 4, 8, 8), torch.rand(3, 3, 4, 8, 8)):
        for latent in latents:
            assert torch.equal(recorded(latent), decoder(latent))
    assert len(record.made) == 1
    assert MAX_DECODED_PIXELS == 4 * 512**2


def test_a_decoder_stays_on_its_device() -> None:
    decoder = vae()
    decoder.vae.to("meta")
    assert stays(lambda: decoder(torch.empty(1, 4, 8, 8, device="meta")))


COMPONENTS = Components(Counting(), lambda: None, vae(), LatentSpace(4, 8), 2)  # type: ignore[arg-type,return-value]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("how", "parts", "device", "may", "network", "decoder"),
    [
        ("eager", COMPONENTS, CUDA, ReplaySupport(), True, True),
        ("none", COMPONENTS, CUDA, ReplaySupport(), False, False),
        ("eager", COMPONENTS, CPU, ReplaySupport(), False, False),
        ("eager", replace(COMPONENTS, capturable=False), CUDA, ReplaySupport(), False, True),
        ("eager", COMPONENTS, CUDA, ReplaySupport(network=False), False, True),
        ("eager", COMPONENTS, CUDA, ReplaySupport(decoder=False), True, False),
        ("eager", replace(COMPONENTS, decoder=lambda x: x), CUDA, ReplaySupport(), True, False),
    ],
)
def test_what_is_recorded(
    how: str,
    parts: Components,
    device: torch.device,
    may: ReplaySupport,
    network: bool,
    decoder: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The record's note says so too."""
    monkeypatch.setattr(apply, "cuda_graph_recorder", lambda: Again)
    engine = EngineConfig(optimize=Optimize[how])
    made = optimize(parts, engine, device, torch.bfloat16, replay=may)
    assert isinstance(made.network, RecordedNetwork) is network
    assert isinstance(made.decoder, RecordedDecoder) is decoder
    assert any("network in CUDA graphs" in note for note in made.notes) is network
    assert any("decoder in CUDA graphs" in note for note in made.notes) is decoder
    engine.eager.cuda_graphs = False
    plain = optimize(parts, engine, device, torch.bfloat16, replay=may)
    assert (plain.network, plain.decoder) == (parts.network, parts.decoder)


@pytest.mark.parametrize(
    ("overrides", "tokens", "expected"),
    [
        ([], 1, ReplaySupport(True, True)),
        (["cache=teacache"], 1, ReplaySupport(False, True)),
        (["cache=guidance_interval"], 1, ReplaySupport(True, True)),
        ([], 2, ReplaySupport(False, False)),
    ],
)
def test_what_may_be_replayed(overrides: list[str], tokens: int, expected: ReplaySupport) -> None:
    config = compose_run(["task=bench", *overrides]).config
    group = SimpleNamespace(size=tokens)
    groups = replace(single_rank_groups(), tokens=group, replica=group)  # type: ignore[arg-type]
    assert replay_support(config, groups) == expected
    config.model.offload = True
    assert replay_support(config, groups) == ReplaySupport(False, False)


def test_the_baseline_engines_graphs_are_not_the_native_ones() -> None:
    requested = ["engine.optimize=compile", "engine.compile.cuda_graphs=true"]
    compose_run(["task=bench", "engine=diffusers", *requested])
    with pytest.raises(ConfigError, match=r"engine\.eager\.cuda_graphs=true"):
        compose_run(["task=bench", *requested])


@pytest.mark.parametrize(
    ("how", "device", "samples"),
    [("eager", "cuda:0", 4), ("none", "cuda:0", 2), ("compile", "cpu", 3), ("eager", "cpu", 2)],
)
def test_no_measured_generation_records_a_graph(how: str, device: str, samples: int) -> None:
    """The counted warm-up is not recorded: one call that runs and one that records follow it, then a plain one."""
    config, generated = compose_run(["task=bench", f"engine.optimize={how}"]).config, list[bool]()

    def generate(count_flops: bool, **options: object) -> SimpleNamespace:
        generated.append(count_flops)
        return SimpleNamespace(client_ms=1.0, result=None)

    generator = SimpleNamespace(config=config, info=SimpleNamespace(device=device), generate=generate)
    MeasurementSession(generator, Progress(disable=True)).warm_up()  # type: ignore[arg-type]
    assert generated == [True, *[False] * (samples - 1)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(TINY))
def test_a_graph_gives_the_plain_numbers(name: str, dtype: torch.dtype) -> None:
    latent, _, condition = moved(TINY[name].inputs, "cuda")
    plain, network = (TINY[name].build(sdpa_attention, dtype).cuda() for _ in range(2))
    fed, condition = latent.to(dtype), condition.to(dtype)
    request, beside = (precompute(n, name).for_batch(condition, TAUS) for n in (network, plain))
    graphs = RecordedNetwork(network, cuda_graph_recorder())
    for n, tau in enumerate([*TAUS, TAUS[0]]):
        x, tau_B = fed * (1 + n), torch.full((len(fed),), tau, device="cuda")
        found, expected = graphs(x, tau_B, request.at(x, tau)), plain(x, tau_B, beside.at(x, tau))
        assert rel_l2(found.float().cpu(), expected.float().cpu()) < 1e-5, tau


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_decoder_in_a_graph_gives_the_plain_pixels() -> None:
    decoder = vae()
    decoder.vae.cuda()
    recorded = RecordedDecoder(decoder, cuda_graph_recorder())
    for latent in torch.rand(4, 2, 4, 8, 8, device="cuda"):
        assert rel_l2(recorded(latent).cpu(), decoder(latent).cpu()) < 1e-5
