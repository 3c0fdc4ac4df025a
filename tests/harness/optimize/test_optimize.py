"""engine.optimize: precomputed, fused and packed networks give what the plain network gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from harness.build.worker import build_worker
from harness.client.generator import DiffusionGenerator
from harness.engines.inprocess import InprocessEngine
from harness.messages import Array, GenerationRequest, RankOutcome, array, decode
from harness.optimize.apply import should_prepack
from harness.optimize.compile_blocks import blocks_of
from harness.optimize.decoder import to_channels_last
from harness.optimize.fuse import fuse_projections
from harness.optimize.precompute import OutputSlice
from harness.optimize.prepack import PackedLinear, prepack
from harness.optimize.upcast import should_upcast
from harness.parallel.mesh import RankPosition, degrees
from harness.pipeline.step_batching import evaluate
from harness.records.record import Record
from harness.resolve.compose import ConfigError, compose_run
from harness.resolve.run import ResolvedRun
from harness.serving.parts import Part
from harness.tasks.common.methods import method_class
from harness.tasks.common.references import reference_config
from models.attention import math_attention
from models.components import Conditioning
from models.decoders import KLDecoder
from tests.fixtures.models.parity import randomize, rel_l2
from tests.fixtures.models.precompute import TAUS, precompute, precompute_plan
from tests.fixtures.parallel.networks import TINY
from tests.fixtures.products import Products

BOUND = 1e-5
NEEDS_BFLOAT16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN packs bfloat16 from AVX-512 or AVX-NE-CONVERT on"
)


def evaluated(network: nn.Module, latent: Tensor, tau: float, condition: Conditioning) -> Tensor:
    with torch.inference_mode():
        return network(latent, torch.full((len(latent),), tau), condition)


@pytest.mark.parametrize("modulation", [True, False])
@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("name", list(TINY))
def test_evaluations_with_precomputed_modulation_are_the_plain_ones(name: str, modulation: bool, text: bool) -> None:
    """At times of the grid in any order, and at one that is not in it."""
    latent, _, condition = TINY[name].inputs
    plain, network = TINY[name].build(math_attention), TINY[name].build(math_attention)
    with torch.inference_mode():
        precomputed = precompute(network, name, modulation, text).for_batch(condition, TAUS)
        for tau in (*TAUS, TAUS[0], 345.5, TAUS[2]):
            mine = evaluated(network, latent, tau, precomputed.at(latent, tau))
            assert rel_l2(mine, evaluated(plain, latent, tau, condition)) < BOUND, tau


@pytest.mark.parametrize("name", list(TINY))
def test_requests_at_other_steps_share_a_forward(name: str) -> None:
    """With prompts of other lengths where the network takes a mask, rows equal the ones evaluated alone."""
    latent, _, condition = TINY[name].inputs
    plain, network = TINY[name].build(math_attention), TINY[name].build(math_attention)
    other = condition
    if condition.mask is not None and condition.prompt_embeds is not None:
        other = replace(condition, prompt_embeds=condition.prompt_embeds[:, :5], mask=condition.mask[:, :5])
    with torch.inference_mode():
        modulation_cache = precompute(network, name)
        requested = [(condition, 700.0), (other, 20.0)]
        precomputed = [modulation_cache.for_batch(c, TAUS).at(latent, tau) for c, tau in requested]
        tau_B = torch.tensor([700.0] * len(latent) + [20.0] * len(latent))
        both = network(torch.cat([latent, latent]), tau_B, Conditioning.stack(precomputed))
        for rows, (c, tau) in zip(both.split(len(latent)), requested, strict=True):
            assert rel_l2(rows, evaluated(plain, latent, tau, c)) < BOUND


@pytest.mark.parametrize("name", [name for name in TINY if precompute_plan(name).time_chains])
def test_every_modulation_is_computed_beforehand(name: str) -> None:
    """No modulation of a block or of the head is left to the evaluations; a conditioning without it is refused."""
    network = TINY[name].build(math_attention)
    linears = [n for n, _ in network.named_modules() if n.endswith("modulation")]
    modulation_cache = precompute(network, name)
    assert linears
    assert all(isinstance(network.get_submodule(n), OutputSlice) for n in linears)
    latent, tau_B, condition = TINY[name].inputs
    with torch.inference_mode(), pytest.raises(ValueError, match="precomputed features"):
        network(latent, tau_B, condition)
    assert modulation_cache.embed_text(condition).encoder_hidden_states is not None or condition.prompt_embeds is None


def test_many_evaluations_are_computed_in_pieces() -> None:
    latent, _, condition = TINY["sd3"].inputs
    plain, network = TINY["sd3"].build(math_attention), TINY["sd3"].build(math_attention)
    taus = [1000.0 - i for i in range(70)]
    with torch.inference_mode():
        precomputed = precompute(network, "sd3").for_batch(condition, taus)
        for tau in (taus[0], taus[31], taus[32], taus[69], taus[5]):
            mine = evaluated(network, latent, tau, precomputed.at(latent, tau))
            assert rel_l2(mine, evaluated(plain, latent, tau, condition)) < BOUND, tau


@pytest.mark.parametrize("name", list(TINY))
def test_joined_projections_are_the_three(name: str) -> None:
    plain, network = TINY[name].build(math_attention), TINY[name].build(math_attention)
    before = sum(p.numel() for p in network.parameters())
    assert fuse_projections(network, TINY[name].plan) > 0
    assert sum(p.numel() for p in network.parameters()) == before
    with torch.inference_mode():
        assert rel_l2(network(*TINY[name].inputs), plain(*TINY[name].inputs)) < BOUND


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=NEEDS_BFLOAT16)])
@pytest.mark.parametrize("name", list(TINY))
def test_packed_linears_are_the_plain_ones(name: str, dtype: torch.dtype) -> None:
    """In bfloat16 it is as near to float32 as the plain network."""
    latent, tau_B, condition = TINY[name].inputs
    exact = TINY[name].build(math_attention)
    plain, network = TINY[name].build(math_attention, dtype), TINY[name].build(math_attention, dtype)
    for block in blocks_of(network, TINY[name].plan):
        prepack(block)
    packed = [module for module in network.modules() if isinstance(module, PackedLinear)]
    assert any(module.activation[0] == "gelu" for module in packed) or name == "z_image"
    low = latent.to(dtype), tau_B, condition.to(dtype)
    with torch.inference_mode():
        mine, theirs, truth = network(*low).float(), plain(*low).float(), exact(latent, tau_B, condition)
        if dtype is torch.float32:
            assert rel_l2(mine, theirs) < BOUND
        else:
            assert rel_l2(mine, truth) < 1.2 * rel_l2(theirs, truth)


def test_packs_where_packed_linears_are_the_faster_ones() -> None:
    cpu, supported = torch.device("cpu"), torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert should_prepack(cpu, torch.bfloat16) == supported
    assert not should_prepack(cpu, torch.float32)
    assert not should_prepack(torch.device("cuda"), torch.bfloat16)


def test_a_request_gives_the_image_of_an_uncached_run() -> None:
    """Guided images of the reference model, with a solver that also evaluates between the grid's rows."""
    (theirs, plain), (mine, other) = (generate_with(f"engine.optimize={how}") for how in ("none", "eager"))
    assert mine[0].std() > 0.1
    assert max(np.abs(x - y).max() for x, y in zip(mine, theirs, strict=True)) < 1e-4
    (said,) = [note for note in other.notes if note.startswith("engine.optimize=eager")]
    assert "precomputed modulation, precomputed text, fused projections" in said
    assert not any(note.startswith("engine.optimize") for note in plain.notes)
    assert other.summary.nfe == plain.summary.nfe == 4


def test_bfloat16_is_multiplied_in_float32_where_a_cpu_has_no_other() -> None:
    """In every network of a request, the text encoders too; nowhere else, and not where it is disabled."""
    slow = should_upcast(torch.device("cpu"), torch.bfloat16)
    for overrides, wide in (([], slow), (["engine.eager.upcast=false"], False), (["engine.optimize=none"], False)):
        config = compose_run(["model.dtype=bfloat16", *overrides]).config
        worker = build_worker(ResolvedRun(config), RankPosition(0, degrees(config.parallel)), torch.device("cpu"))
        requested = GenerationRequest("a", ["rocket"], steps=1, guidance=3.0, seed=7, height=32, width=32)
        with Products() as seen:
            outcome = decode(worker.generate(requested, lambda *precomputed: None, lambda: False))
        assert isinstance(outcome, RankOutcome)
        assert outcome.report is not None
        assert any("products in float32" in note for note in outcome.report.notes) == wide
        assert (torch.bfloat16 not in seen.dtypes) == wide
        assert not wide or seen.dtypes


def generate_with(*overrides: str) -> tuple[list[Array], Record]:
    process = ["launch.mode=inprocess", "launch.threads_per_rank=1", "logger=json", "scheduler/solver=dpm2"]
    requested = ["request.prompts=[rocket,red apple]", "request.steps=3", "request.batch_size=2"]
    config = compose_run([*process, *requested, *overrides]).config
    with DiffusionGenerator(ResolvedRun(config), InprocessEngine(config)) as generator:
        generated = generator.generate()
        return generated.pixels, generated.record


def test_requests_at_other_steps_are_generated_as_if_alone() -> None:
    """Step by step in shared forwards, with other prompts and numbers of steps."""
    config = compose_run(["engine.optimize=eager", "request.prompt=rocket"]).config
    worker = build_worker(ResolvedRun(config), RankPosition(0, degrees(config.parallel)), torch.device("cpu"))
    requested = [
        GenerationRequest(prompt, [prompt], steps=steps, guidance=guidance, seed=7, height=32, width=32, latents="last")
        for prompt, steps, guidance in (("rocket", 4, 3.0), ("a red apple, 3d", 2, 1.0), ("sun", 3, 5.0))
    ]
    alone = [latent_of(worker.generate(request, lambda *precomputed: None, lambda: False)) for request in requested]
    rows: list[int] = []
    with torch.inference_mode():
        courses = [
            worker.fiber(Part(request, 0, "client"), lambda *step: None, lambda *preview: None, [])
            for request in requested
        ]
        while waiting := [(fiber, fiber.call) for fiber in courses if fiber.call is not None]:
            outputs = evaluate([call for _, call in waiting], may_answer=lambda error: False, count=rows.append)
            for (fiber, _), output in zip(waiting, outputs, strict=True):
                fiber.advance(output)
        for fiber in courses:
            fiber.advance(None)  # decode
    assert rows == [5, 5, 4, 2]
    for fiber, wanted in zip(courses, alone, strict=True):
        assert rel_l2(latent_of(fiber.result), wanted) < BOUND


def latent_of(frames: list[bytes]) -> Tensor:
    outcome = decode(frames)
    assert isinstance(outcome, RankOutcome)
    assert outcome.failure is None
    (sample,) = outcome.samples
    assert sample.latents is not None
    return torch.from_numpy(array(sample.latents, frames).copy())


@pytest.mark.parametrize("onednn", [True, False])
def test_a_channels_last_decoder_decodes_the_same(onednn: bool) -> None:
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=16,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    ).eval()
    randomize(vae)
    decoder, latent = KLDecoder(vae), torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=onednn):
        plain = decoder(latent)
        assert to_channels_last(decoder)
        assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert plain.std() > 0.01
        torch.testing.assert_close(decoder(latent), plain, rtol=0, atol=1e-5)


def test_it_is_declared_and_its_reference_goes_without() -> None:
    config = compose_run(["engine.optimize=eager", "attention=math"]).config
    claimed, names = method_class(config)
    assert (claimed, names) == ("fp_equivalent", ["optimised network"])
    assert reference_config(config).engine.optimize.name == "none"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["engine.optimize=eager", "parallel=ulysses2", "parallel.shard_weights=true"], "parallel.shard_weights"),
        (["engine.optimize=eager", "engine=diffusers"], "does not go with engine=diffusers"),
        (["engine.optimize=fast"], "engine.optimize"),
        (["engine.optimize=compile", "task=train"], "does not go with task=train: it has no effect on training"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose_run(overrides)


@pytest.mark.parametrize(
    ("optimize", "key"), [("none", "engine.eager.text=false"), ("eager", "engine.compile.freezing=true")]
)
def test_a_key_without_effect_warns(optimize: str, key: str) -> None:
    notes = compose_run([f"engine.optimize={optimize}", key]).notes
    assert any(f"no effect with engine.optimize={optimize}" in note for note in notes)


@pytest.mark.parametrize(
    ("overrides", "chosen"),
    [
        ([], "eager"),
        (["engine.optimize=auto", "request.steps=1"], "eager"),
        (["engine.optimize=none"], "none"),
        (["parallel=ulysses2"], "eager"),
        (["parallel=pipe2"], "none"),
        (["parallel=ulysses2", "parallel.shard_weights=true"], "none"),
        (["engine=diffusers"], "none"),
        (["task=train"], "none"),
    ],
)
def test_what_is_not_configured_is_chosen_and_recorded(overrides: list[str], chosen: str) -> None:
    assert compose_run(overrides).config.engine.optimize.name == chosen
