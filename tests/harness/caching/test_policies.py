"""The group `cache`: what composes, guidance, shared forwards, records, equal-latency baselines."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch

from harness.caching.policies import CachedNetwork, FirstBlockCache, cached_network, guidance_schedule
from harness.client.generator import DiffusionGenerator
from harness.config.cache import TEACACHE_DEFAULTS
from harness.parallel.attention import SequenceState
from harness.parallel.group import single_process_group
from harness.pipeline.cache_state import CacheState
from harness.pipeline.denoise import Denoising, DenoisingOptions
from harness.pipeline.guidance import GuidanceInterval, GuidanceReuse, GuidanceSchedule
from harness.pipeline.latents import LatentPreparation, seeded_noise
from harness.pipeline.state import Evaluate, Evaluation, Sample, image_specs
from harness.pipeline.step_batching import RequestFiber, evaluate
from harness.pipeline.text import TextEncoding
from harness.pipeline.timesteps import TimestepPreparation
from harness.records.record import CacheUse, Record
from harness.resolve.compose import ConfigError, compose_run
from harness.tasks.common.methods import method_class
from harness.tasks.common.references import floor_config, reference_config, reference_key
from harness.tasks.report.equal_latency import LatencyPoint as Plain
from harness.tasks.report.equal_latency import equal_latency_baseline, equal_latency_baselines
from harness.tasks.report.keys import cache_name
from models.attention import math_attention
from models.blocks import wrap_runners
from models.components import LatentSpace
from schedulers.build import build
from schedulers.grid import Point
from schedulers.prediction import Estimate
from schedulers.settings import NoiseSchedulerSettings
from tests.fixtures.models.parity import rel_l2
from tests.fixtures.parallel.networks import TINY, Inputs, rows
from tests.fixtures.report_tree import Maker, apart
from tests.fixtures.toy_pipeline import FAMILIES, ToyEncoder, ToyNetwork, context, request

# ---------------------------------------------------------------- what composes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cache.name=tea"], "cache.name=tea is not one of none, teacache"),
        (
            ["cache=first_block", "model=sd15", "model.load=dummy"],
            "does not go with model=sd15: .* is a U-Net; use cache=guidance_interval",
        ),
        (
            ["cache=teacache", "engine=diffusers"],
            "with engine=diffusers: it works only in the native engine; leave out the engine",
        ),
        (
            ["cache=teacache", "engine.optimize=compile"],
            "it looks into a block",
        ),
        (["cache=taylorseer", "cache.interval=0"], "cache.interval=0; give 1 to 10000"),
        (["cache=first_block", "cache.threshold=-0.1"], "cache.threshold=-0.1; give at least 0"),
        (["cache=first_block", "cache.warmup=0"], "cache.warmup=0; give 1 to 10000"),
        (["cache=guidance_interval", "cache.sigma_high=0.1"], "sigma_high=0.1 is not above cache.sigma_low=0.28"),
        (["task.reference_steps=20"], "reference_steps=20 belongs to a measured error; add task.fidelity=true"),
        (
            ["task=bench", "task.fidelity_per_step=true", "task.reference_steps=8"],
            "task.fidelity_per_step compares step by step",
        ),
        (["task=bench", "task.reference_steps=0"], "give 1 to"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run(overrides)


def test_what_has_no_effect_is_reported() -> None:
    assert compose_run(["cache=taylorseer", "cache.threshold=0.1"]).notes == [
        "cache.threshold has no effect with cache=taylorseer"
    ]
    (note,) = compose_run(["cache=guidance_skip", "request.guidance=1"]).notes
    assert note.startswith("cache=guidance_skip has no effect with request.guidance=1")


def test_published_values_fill_what_is_open() -> None:
    flux = compose_run(["cache=teacache", "model=flux", "model.load=dummy"]).config.cache
    assert (tuple(flux.coefficients or ()), flux.warmup, flux.final) == (
        TEACACHE_DEFAULTS["flux"].coefficients,
        1,
        True,
    )
    wan = compose_run(["cache=teacache", "model=wan_1_3b", "model.load=dummy"]).config.cache
    assert (wan.warmup, wan.final) == (5, False)
    own = compose_run(["cache=teacache", "cache.coefficients=[2,0]", "model=flux", "model.load=dummy"]).config.cache
    assert own.coefficients == [2.0, 0.0]
    assert compose_run(["cache=teacache"]).config.cache.coefficients == [1.0, 0.0]


@pytest.mark.parametrize("cache", ["teacache", "first_block", "taylorseer", "guidance_interval", "guidance_skip"])
def test_a_cache_is_declared_approximate_and_its_reference_has_none(cache: str) -> None:
    plain, config = (compose_run(["task=bench", *extra]).config for extra in ([], [f"cache={cache}"]))
    assert method_class(config)[0] == "approximate"
    assert "cache" in method_class(config)[1]
    for of in (reference_config, floor_config):
        assert of(config).cache.name == "none"
        assert reference_key(of(config), []) == reference_key(of(plain), [])


def test_fewer_steps_are_held_against_the_reference_of_all_of_them() -> None:
    full, fewer, apart_steps = (
        compose_run(["task=bench", *extra]).config
        for extra in (
            ["request.steps=20"],
            ["request.steps=7", "task.reference_steps=20"],
            ["request.steps=7"],
        )
    )
    assert (
        reference_key(reference_config(fewer), [])
        == reference_key(reference_config(full), [])
        != reference_key(reference_config(apart_steps), [])
    )
    assert reference_config(fewer).request.steps == floor_config(fewer).request.steps == 20
    assert method_class(fewer)[0] == "approximate"
    assert "fewer steps" not in method_class(apart_steps)[1]


def test_no_block_cache_and_plain_guidance_are_the_default() -> None:
    config = compose_run([]).config.cache
    network = TINY["pixart"].build(math_attention)
    assert cached_network(config, network, TINY["pixart"].plan, single_process_group(), SequenceState()) is None
    assert Denoising(network, torch.float32, build(FAMILIES[0])).options.guidance_schedule is guidance_schedule(config)


# ---------------------------------------------------------------- guidance, by hand


def samples_for(steps: int, settings: NoiseSchedulerSettings) -> list[Sample]:
    scheduler, run = build(settings), context()
    samples = [Sample(spec) for spec in image_specs(request(prompts=["red"], steps=steps))]
    TextEncoding(ToyEncoder).forward(samples, run)
    TimestepPreparation(scheduler, 8).forward(samples, run)
    LatentPreparation(LatentSpace(4, 2), scheduler).forward(samples, run)
    return samples


def reference_loop(
    settings: NoiseSchedulerSettings, sample: Sample, guided: Callable[[int, Point], str]
) -> torch.Tensor:
    """Run a loop over the schedulers with two calls of the network where an evaluation has both branches."""
    scheduler, network = build(settings), ToyNetwork()
    assert sample.grid is not None
    assert sample.text is not None
    assert sample.negative is not None
    evaluation, difference = 0, torch.zeros(())

    def denoise(x: torch.Tensor, point: Point) -> Estimate:
        nonlocal evaluation, difference
        tau = torch.tensor([point.tau], dtype=torch.float32)
        prompt = network(x * point.c_in, tau, sample.text)
        how = guided(evaluation, point)
        if how == "both":
            difference = prompt - network(x * point.c_in, tau, sample.negative)
        evaluation += 1
        mixed = prompt if how == "alone" else prompt + 2.0 * difference  # guidance 3
        return scheduler.prediction.estimate(mixed, x, point)

    start = scheduler.init_noise(seeded_noise(sample.spec.seed, (4, 8, 8))[None], sample.grid)
    return scheduler.sample(start, sample.grid, denoise, lambda step: torch.zeros(()))[0]


CASES: dict[str, tuple[GuidanceSchedule, Callable[[int, Point], str]]] = {
    "interval": (
        GuidanceInterval(0.3, 4.0),
        lambda n, point: "both" if 0.3 < point.sigma / point.alpha <= 4.0 else "alone",
    ),
    "skip": (GuidanceReuse(2, 3), lambda n, point: "both" if n in (0, 1, 4, 7, 10) else "kept"),
}


@pytest.mark.parametrize("settings", [FAMILIES[2], FAMILIES[4]], ids=["ddim", "sgm heun"])
@pytest.mark.parametrize("case", list(CASES))
def test_guidance_is_what_a_manual_loop_generates(case: str, settings: NoiseSchedulerSettings) -> None:
    when, by_hand = CASES[case]
    (sample,) = samples_for(6, settings)
    network, run = ToyNetwork(), context()
    Denoising(network, torch.float32, build(settings), options=DenoisingOptions(guidance_schedule=when)).forward(
        [sample], run
    )
    assert sample.latent is not None
    assert rel_l2(sample.latent, reference_loop(settings, sample, by_hand)) < 1e-5
    assert set(network.batches) == {1, 2}
    (skips,) = run.skips
    assert (skips.evaluations, skips.skipped) == (len(network.batches), [])
    assert (skips.branches, skips.branches_computed) == (2 * len(network.batches), sum(network.batches))


@pytest.mark.parametrize("when", [GuidanceInterval(0.0, math.inf), GuidanceReuse(1, 1)])
def test_guidance_everywhere_is_guidance(when: GuidanceSchedule) -> None:
    (plain,), (sample,) = samples_for(5, FAMILIES[0]), samples_for(5, FAMILIES[0])
    Denoising(ToyNetwork(), torch.float32, build(FAMILIES[0])).forward([plain], context())
    Denoising(
        ToyNetwork(), torch.float32, build(FAMILIES[0]), options=DenoisingOptions(guidance_schedule=when)
    ).forward([sample], context())
    assert plain.latent is not None
    assert sample.latent is not None
    assert torch.equal(plain.latent, sample.latent)


# ---------------------------------------------------------------- shared forwards


def test_requests_that_share_forwards_skip_their_own_evaluations() -> None:
    tiny, rule = TINY["pixart"], FirstBlockCache(1, False, 0, 0.12)
    network = CachedNetwork(tiny.build(math_attention), tiny.plan, rule, single_process_group(), SequenceState())
    wrap_runners(network.network, tiny.plan, network)
    latent, tau_B, condition = tiny.inputs
    drift = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))

    def inputs_of(row: int, k: int) -> Inputs:
        return rows((latent + 0.04 * (row + 1) * k * drift, tau_B * 0.98**k, condition), [row])

    def fiber(row: int, count: int, owner: CacheState) -> RequestFiber[list[torch.Tensor]]:
        def work(evaluation: Evaluate) -> list[torch.Tensor]:
            with torch.inference_mode():
                return [evaluation(Evaluation(network, *inputs_of(row, k), (owner,))) for k in range(count)]

        return RequestFiber(work)

    def drive(*courses: RequestFiber[list[torch.Tensor]]) -> None:
        while waiting := [(fiber, fiber.call) for fiber in courses if fiber.call is not None]:
            with torch.inference_mode():
                outputs = evaluate([call for _, call in waiting], may_answer=bool, count=lambda rows: None)
            for (one, _), output in zip(waiting, outputs, strict=True):
                one.advance(output)

    own_states, cache_states = (CacheState(), CacheState()), (CacheState(), CacheState())
    by_themselves = [fiber(row, count, own_states[row]) for row, count in ((0, 6), (1, 8))]
    for one in by_themselves:
        drive(one)
    together = [fiber(row, count, cache_states[row]) for row, count in ((0, 6), (1, 8))]
    drive(*together)
    for one, other, owner, apart_owner in zip(by_themselves, together, cache_states, own_states, strict=True):
        assert owner.computed == apart_owner.computed
        assert not all(owner.computed)
        assert all(rel_l2(y, x) < 1e-5 for x, y in zip(one.result, other.result, strict=True))
    assert cache_states[0].computed != cache_states[1].computed[:6]


# ---------------------------------------------------------------- the built-in model, its record and the report


def generate(*overrides: str) -> tuple[np.ndarray, Record]:
    inputs_of = ["request.prompt=rocket", "request.steps=8", "request.height=32", "request.width=32"]
    with DiffusionGenerator.from_config("launch.mode=inprocess", "logger=json", *inputs_of, *overrides) as generator:
        answer = generator.generate()
        return answer.pixels[0], answer.record


def test_the_record_says_what_was_spared() -> None:
    plain, without = generate()
    assert without.statistics.cache is None
    for same in ("cache=teacache", "cache=first_block"):
        pixels, record = generate(same, "cache.threshold=0")
        assert np.array_equal(pixels, plain), same
        assert record.statistics.nfe == 8
        assert any("it skipped nothing" in note for note in record.notes)
    pixels, record = generate("cache=taylorseer", "cache.warmup=2")
    assert not np.array_equal(pixels, plain)
    assert record.statistics.cache == CacheUse(8.0, 4.0, 16.0, 8.0)
    assert record.statistics.nfe == 4
    assert "cache=taylorseer computed 8 of 16 branches per image, in 4 of 8 evaluations" in "".join(record.notes)
    assert "nfe does not count the others, of the first image 2, 3, 5, 6" in "".join(record.notes)


def test_a_cache_has_a_short_name() -> None:
    def name(*overrides: str) -> str:
        return cache_name(msgspec.to_builtins(compose_run(overrides).config.cache))

    assert name() == "none"
    assert name("cache=teacache") == "teacache threshold=0.1"
    assert name("cache=first_block", "cache.order=1") == "first_block threshold=0.1 order=1"
    assert name("cache=guidance_interval") == "guidance_interval sigma_low=0.28 sigma_high=5.42"


def test_an_equal_latency_baseline_takes_no_longer_and_a_line_between_two_interpolates() -> None:
    plain = [Plain(100.0, 0.4, 0), Plain(200.0, 0.2, 1), Plain(400.0, 0.0, 2)]
    better, worse = (
        equal_latency_baseline(Plain(300.0, 0.05, 9), plain),
        equal_latency_baseline(Plain(300.0, 0.15, 9), plain),
    )
    assert better is not None
    assert worse is not None
    assert (better.run, better.error_at_equal_latency, better.better) == (1, pytest.approx(0.1), "cache")
    assert worse.better == "fewer steps"
    slower = equal_latency_baseline(Plain(500.0, 0.1, 9), plain)
    assert slower is not None
    assert (slower.run, slower.error_at_equal_latency, slower.better) == (2, None, "fewer steps")
    assert equal_latency_baseline(Plain(50.0, 0.1, 9), plain) is None


def test_equal_latency_baselines_have_one_reference_and_equal_settings_otherwise() -> None:
    make = Maker()

    def row(time: float, error: float, steps: int, reference: str = "k", **changes: object) -> Record:
        found = make.record({"request.steps": steps, **changes}, time, apart(error))
        assert found.fidelity is not None
        return msgspec.structs.replace(found, fidelity=msgspec.structs.replace(found.fidelity, reference=reference))

    def cached(record: Record) -> Record:
        assert record.summary is not None
        summary = msgspec.structs.replace(record.summary, cache=CacheUse(20, 10, 40, 20))
        return msgspec.structs.replace(record, summary=summary)

    with_cache = cached(row(100.0, 0.05, 20, **{"cache.name": "first_block"}))
    fewer, other_reference = row(90.0, 0.1, 9), row(95.0, 0.01, 9, reference="other")
    other_kernel = row(95.0, 0.01, 9, **{"attention.backend": "math"})
    found = equal_latency_baselines(dict(enumerate([with_cache, other_reference, other_kernel, fewer])))
    assert {place: (each.run, each.better) for place, each in found.items()} == {0: (3, "cache")}
    assert equal_latency_baselines({0: with_cache, 1: other_reference}) == {}


def test_a_tree_of_an_experiment_is_composed() -> None:
    config = compose_run(["experiment=caches", "cache=teacache_fast", "request.steps=7"]).config
    assert (config.cache.threshold, config.task.reference_steps) == (0.3, 20)
