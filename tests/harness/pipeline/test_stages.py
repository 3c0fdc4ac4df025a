"""The stages one by one: wiring, guidance, noise, denoising against the schedulers by hand, cancellation, faults."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from harness.device.memory import ResidentMemory
from harness.messages import Failure, GenerationRequest, RankOutcome, array, decode
from harness.parallel.mesh import RankPosition
from harness.pipeline.composed import ComposedPipeline
from harness.pipeline.decode import Decoding
from harness.pipeline.denoise import Denoising
from harness.pipeline.executor import SyncExecutor
from harness.pipeline.guidance import Branches
from harness.pipeline.latents import LatentPreparation, seeded_noise, step_noise
from harness.pipeline.offload import OffloadedStage
from harness.pipeline.stage import Stage, check_wiring
from harness.pipeline.state import Cancelled, ImageSpec, RunContext, Sample, image_specs, micro_batches
from harness.pipeline.text import TextEncoding
from harness.pipeline.timesteps import TimestepPreparation
from harness.pipeline.validate import InputValidation, Limits
from harness.serving.worker import Worker
from models.components import Conditioning, LatentSpace, networks_in
from schedulers.build import build
from schedulers.grid import Point
from schedulers.prediction import Estimate
from schedulers.settings import NoiseSchedulerSettings
from tests.fixtures.parallel.layouts import POINT
from tests.fixtures.toy_pipeline import FAMILIES, ToyDecoder, ToyEncoder, ToyNetwork, context, request


def worker(network: nn.Module, settings: NoiseSchedulerSettings = FAMILIES[0], decoder: object = None) -> Worker:
    scheduler = build(settings)
    stages: list[Stage] = [
        TextEncoding(ToyEncoder),
        TimestepPreparation(scheduler, 8),
        LatentPreparation(LatentSpace(4, 2), scheduler),
        Denoising(network, torch.float32, scheduler),
        Decoding(decoder or ToyDecoder()),  # type: ignore[arg-type]
    ]
    pipeline = ComposedPipeline(InputValidation(Limits(8, 64 * 64), scheduler), stages, SyncExecutor())
    return Worker(pipeline, RankPosition(0, (1, 1, 1, 1, 1)), torch.device("cpu"), ResidentMemory())


def generate(
    requested: GenerationRequest, network: nn.Module, settings: NoiseSchedulerSettings = FAMILIES[0]
) -> tuple[RankOutcome, list[np.ndarray]]:
    frames = worker(network, settings).generate(requested, lambda stage, done, total: None, lambda: False)
    outcome = decode(frames)
    assert isinstance(outcome, RankOutcome)
    return outcome, [array(sample.pixels, frames) for sample in outcome.samples]


# ---------------------------------------------------------------- wiring


class Named:
    """A stage that does nothing but declare what it reads and writes."""

    def __init__(self, name: str, reads: set[str], writes: set[str]) -> None:
        self.name, self.reads, self.writes = name, frozenset(reads), frozenset(writes)

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        raise AssertionError("wiring is checked without running")


def test_a_field_that_nobody_writes_is_refused() -> None:
    with pytest.raises(ValueError, match="stage a reads text before it is written; no stage writes it"):
        check_wiring([Named("a", {"spec", "text"}, set())])


def test_a_field_that_is_written_too_late_is_refused() -> None:
    with pytest.raises(ValueError, match="stage a reads grid before it is written; put b before it"):
        check_wiring([Named("a", {"grid"}, {"latent"}), Named("b", {"spec"}, {"grid"})])


def test_a_stage_does_not_feed_itself() -> None:
    with pytest.raises(ValueError, match="put a before it"):
        check_wiring([Named("a", {"grid"}, {"grid"})])


@pytest.mark.parametrize(("reads", "writes"), [({"colour"}, set()), (set(), {"colour"})])
def test_a_foreign_field_is_refused(reads: set[str], writes: set[str]) -> None:
    with pytest.raises(ValueError, match="names colour, which a Sample does not have"):
        check_wiring([Named("a", reads, writes)])


def test_the_real_order_is_wired_and_any_other_is_not() -> None:
    stages = worker(ToyNetwork()).pipeline.stages
    check_wiring(stages)
    for first, second in ((2, 3), (3, 4), (1, 4), (3, 5)):
        swapped = list(stages)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        with pytest.raises(ValueError, match="before it is written"):
            check_wiring(swapped)


def test_stages_touch_only_what_they_declare() -> None:
    """Each stage writes the declared fields, and runs with every field removed that it does not read."""
    run = context()
    samples = [Sample(spec) for spec in image_specs(request())]
    for stage in worker(ToyNetwork()).pipeline.stages:
        hidden = [
            {
                field.name: getattr(sample, field.name)
                for field in dataclasses.fields(Sample)
                if field.name not in stage.reads
            }
            for sample in samples
        ]
        for sample, taken in zip(samples, hidden, strict=True):
            for name in taken:
                setattr(sample, name, None)
        stage.forward(samples, run)
        for sample, taken in zip(samples, hidden, strict=True):
            written = {name for name in taken if getattr(sample, name) is not None}
            assert written <= stage.writes
            for name, value in taken.items():
                if name not in written:
                    setattr(sample, name, value)
    assert all(sample.pixels is not None for sample in samples)


def test_a_sample_is_small() -> None:
    assert len(dataclasses.fields(Sample)) <= 16


# ---------------------------------------------------------------- guidance


def sample(text: float, negative: float, guidance: float) -> Sample:
    spec = ImageSpec(0, "p", "n", 0, 1, guidance, 16, 16)
    mask = torch.ones(1, 8, dtype=torch.bool)
    return Sample(
        spec, Conditioning(torch.full((1, 8, 4), text), mask), Conditioning(torch.full((1, 8, 4), negative), ~mask)
    )


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0, 7.5])
def test_guidance_extrapolates_from_the_negative_to_the_prompt(guidance: float) -> None:
    branches = Branches([sample(1.0, -1.0, guidance), sample(2.0, -2.0, guidance)])
    assert branches.condition.prompt_embeds[:, 0, 0].tolist() == [-1.0, -2.0, 1.0, 2.0]
    assert branches.condition.mask[:, 0].tolist() == [False, False, True, True]
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(branches.duplicate(x), torch.cat([x, x]))
    output = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    expected = (1 - guidance) * output[:2] + guidance * output[2:]
    torch.testing.assert_close(branches.combine(output, POINT), expected)


def test_guidance_one_is_one_branch() -> None:
    branches = Branches([sample(1.0, -1.0, 1.0)])
    assert branches.condition.prompt_embeds.shape[0] == 1
    x = torch.randn(1, 4, 8, 8)
    assert branches.duplicate(x) is x
    assert branches.combine(x, POINT) is x
    network, encoder = ToyNetwork(), ToyEncoder()
    generate(request(guidance=1.0), network)
    assert set(network.batches) == {1}
    assert network.calls == 8
    samples = [Sample(spec) for spec in image_specs(request(guidance=1.0))]
    TextEncoding(lambda: encoder).forward(samples, context())
    assert encoder.prompts == ["red", "blue"]
    assert all(sample.negative is None for sample in samples)


def test_each_distinct_prompt_is_encoded_once() -> None:
    encoder = ToyEncoder()
    samples = [Sample(spec) for spec in image_specs(request(prompts=["red", "red", "blue"], samples_per_prompt=2))]
    TextEncoding(lambda: encoder).forward(samples, context())
    assert sorted(encoder.prompts) == ["", "blue", "red"]


def test_a_prompt_that_is_truncated_is_noted() -> None:
    outcome, _ = generate(request(prompts=["a prompt of many letters"]), ToyNetwork())
    assert outcome.report is not None
    assert outcome.report.notes == ["a prompt of 24 tokens was truncated to 8: 'a prompt of many letters'"]


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**62])
def test_the_noise_is_diffusers_own(seed: int) -> None:
    theirs = randn_tensor((1, 4, 16, 16), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)
    assert torch.equal(seeded_noise(seed, (4, 16, 16)), theirs[0])


def test_the_first_state_is_the_noise_scaled_to_the_grid() -> None:
    for settings in FAMILIES:
        scheduler = build(settings)
        samples = [Sample(spec, grid=scheduler.grid(spec.steps)) for spec in image_specs(request())]
        LatentPreparation(LatentSpace(4, 2), scheduler).forward(samples, context())
        for k, one in enumerate(samples):
            assert one.start is not None
            assert one.grid is not None
            torch.testing.assert_close(one.start, one.grid.init_std * seeded_noise(5 + k, (4, 8, 8)), rtol=1e-6, atol=0)


def test_noise_of_seeds_and_steps_never_meets() -> None:
    generated = [seeded_noise(seed, (64,)) for seed in range(20)]
    generated += [step_noise(seed, step, (64,)) for seed in range(20) for step in range(20)]
    assert len({tuple(noise.tolist()) for noise in generated}) == len(generated)
    together = torch.stack(generated)
    correlation = torch.corrcoef(together) - torch.eye(len(generated))
    assert correlation.abs().max() < 0.75  # 64 numbers, 88,000 pairs: chance reaches about 0.57
    assert torch.equal(step_noise(3, 4, (64,)), step_noise(3, 4, (64,)))


def test_image_k_has_seed_plus_k_over_prompts_then_samples() -> None:
    rows = image_specs(request(samples_per_prompt=2))
    assert [(row.index, row.prompt, row.seed) for row in rows] == [
        (0, "red", 5),
        (1, "red", 6),
        (2, "blue", 7),
        (3, "blue", 8),
    ]
    assert micro_batches(list(range(5)), 2) == [[0, 1], [2, 3], [4]]


# ---------------------------------------------------------------- denoising


@pytest.mark.parametrize("settings", FAMILIES, ids=str)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_request_is_the_schedulers_loop_by_hand(settings: NoiseSchedulerSettings, guidance: float) -> None:
    network, encoder, scheduler = ToyNetwork(), ToyEncoder(), build(settings)
    _, images = generate(request(guidance=guidance), network, settings)
    grid = scheduler.grid(4)
    for k, prompt in enumerate(("red", "blue")):
        text, negative = encoder([prompt]), encoder([""])
        seed = 5 + k

        def denoise(x: Tensor, point: Point, text: Conditioning = text, negative: Conditioning = negative) -> Estimate:
            tau = torch.tensor([point.tau], dtype=torch.float32)
            output = network(x * point.c_in, tau, text)
            if guidance != 1:
                base = network(x * point.c_in, tau, negative)
                output = base + guidance * (output - base)
            return scheduler.prediction.estimate(output, x, point)

        def noise(step: int, seed: int = seed) -> Tensor:
            return step_noise(seed, step, (4, 8, 8))[None]

        x = scheduler.init_noise(seeded_noise(seed, (4, 8, 8))[None], grid)
        expected = ToyDecoder()(scheduler.sample(x, grid, denoise, noise))[0]
        torch.testing.assert_close(torch.tensor(images[k]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", FAMILIES, ids=str)
def test_an_image_does_not_depend_on_its_batch(settings: NoiseSchedulerSettings) -> None:
    prompts = ["red", "blue", "green"]
    _, alone = generate(request(prompts=prompts), ToyNetwork(), settings)
    for size in (2, 3, 8):
        _, together = generate(request(prompts=prompts, batch_size=size), ToyNetwork(), settings)
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    _, single = generate(request(prompts=["blue"], seed=6), ToyNetwork(), settings)
    assert np.array_equal(single[0], alone[1])
    assert not np.array_equal(alone[0], alone[1])


def test_evaluations_and_steps_are_counted() -> None:
    outcome, _ = generate(request(steps=5), ToyNetwork(), NoiseSchedulerSettings("rectified_flow", solver="heun"))
    report = outcome.report
    assert report is not None
    assert report.network_evaluations == {"text_encoder": 3, "denoiser": 2 * 9, "decoder": 2}
    assert [step.step for step in report.denoise_steps_ms] == list(range(10))
    assert [stage.name for stage in report.stages] == [point.name for point in report.memory_checkpoints]
    denoising = next(stage.duration_ms for stage in report.stages if stage.name == "denoising")
    steps = sum(step.duration_ms for step in report.denoise_steps_ms)
    assert report.networks_ms["denoiser"] <= steps <= denoising


def test_the_network_runs_in_its_dtype_and_the_state_in_float32() -> None:
    class Seen(ToyNetwork):
        def forward(self, latent: Tensor, tau: Tensor, condition: Conditioning) -> Tensor:
            assert latent.dtype == condition.require_prompt_embeds().dtype == torch.bfloat16
            assert tau.dtype == torch.float32
            return super().forward(latent, tau.to(latent.dtype), condition)

    scheduler = build(FAMILIES[0])
    samples = [Sample(spec) for spec in image_specs(request())]
    run = context()
    TextEncoding(ToyEncoder).forward(samples, run)
    TimestepPreparation(scheduler, 8).forward(samples, run)
    LatentPreparation(LatentSpace(4, 2), scheduler).forward(samples, run)
    Denoising(Seen(), torch.bfloat16, scheduler).forward(samples, run)
    for one in samples:
        assert one.latent is not None
        assert one.latent.dtype == torch.float32
        assert not torch.equal(one.latent, one.latent.bfloat16().float())


# ---------------------------------------------------------------- cancellation and faults


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_cancelled_request_stops_within_one_step(after: int, solver: str) -> None:
    network, done = ToyNetwork(), 0

    def on_progress(stage: str, steps: int, total: int) -> None:
        nonlocal done
        done = steps
        assert total == (100 if steps else 0)

    one = worker(network, NoiseSchedulerSettings("rectified_flow", solver=solver))
    frames = one.generate(request(steps=50), on_progress, lambda: done >= after)
    outcome = decode(frames)
    assert isinstance(outcome, RankOutcome)
    assert outcome.failure == Failure("r", "cancelled", "the request was cancelled", 0)
    assert outcome.samples == []
    assert network.calls == after * (2 if solver == "heun" else 1)
    answer = decode(one.generate(request(), lambda stage, done, total: None, lambda: False))
    assert isinstance(answer, RankOutcome)
    assert answer.failure is None  # the worker continues to generate


def test_cancellation_reaches_the_decoder() -> None:
    run = context(check_cancelled=lambda: (_ for _ in ()).throw(Cancelled()))
    with pytest.raises(Cancelled):
        Decoding(ToyDecoder()).forward([Sample(image_specs(request())[0], latent=torch.zeros(4, 8, 8))], run)


class Broken(ToyNetwork):
    """Raises what it is given, or returns it."""

    def __init__(self, outcome: BaseException | float) -> None:
        super().__init__()
        self.outcome = outcome

    def forward(self, latent: Tensor, tau: Tensor, condition: Conditioning) -> Tensor:
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return torch.full_like(latent, self.outcome)


@pytest.mark.parametrize(
    ("outcome", "kind", "says"),
    [
        (float("nan"), "failed", "not finite"),
        (MemoryError("no room"), "oom", "no room"),
        (torch.OutOfMemoryError("CUDA out of memory\nmore"), "oom", "CUDA out of memory"),
        (NotImplementedError("no kernel"), "unsupported", "no kernel"),
        (RuntimeError("broken\nlines"), "failed", "RuntimeError: broken"),
    ],
    ids=repr,
)
def test_what_goes_wrong_is_a_typed_failure_in_one_line(outcome: BaseException | float, kind: str, says: str) -> None:
    answer, _ = generate(request(), Broken(outcome))
    assert answer.failure is not None
    assert answer.failure.kind == kind
    assert answer.failure.rank == 0
    assert says in answer.failure.message
    assert "\n" not in answer.failure.message


def test_one_bad_value_in_one_image_is_enough() -> None:
    class Spoiled(ToyDecoder):
        def __call__(self, latent: Tensor) -> Tensor:
            pixels = super().__call__(latent)
            pixels[..., 0, 0] = float("inf")
            return pixels

    one = worker(ToyNetwork(), decoder=Spoiled())
    answer = decode(one.generate(request(), lambda stage, done, total: None, lambda: False))
    assert isinstance(answer, RankOutcome)
    assert answer.failure is not None
    assert "not finite" in answer.failure.message


def test_an_exception_ends_a_rank_that_others_wait_for() -> None:
    one = worker(Broken(RuntimeError("broken")))
    one.position = RankPosition(0, (1, 1, 1, 1, 2))
    one.groups = dataclasses.replace(one.groups, all_raise=lambda: False)
    with pytest.raises(RuntimeError, match="broken"):
        one.generate(request(), lambda stage, done, total: None, lambda: False)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"height": 20}, "16 or 24"),
        ({"width": 0}, "make is 8"),
        ({"height": 8, "width": 8192}, "at most 4096"),
        ({"steps": 0}, "1 to 10000"),
        ({"seed": -1}, "request.seed=-1"),
        ({"prompts": []}, "0 images"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"batch_size": 0}, "at least 1"),
        ({"prompts": ["a" * 8001]}, "8001 characters"),
        ({"negative_prompt": "a" * 8001}, "8001 characters"),
    ],
    ids=str,
)
def test_what_cannot_be_generated_is_refused_before_any_stage(changes: dict[str, object], says: str) -> None:
    network = ToyNetwork()
    with pytest.raises(ValueError, match=says) as caught:
        worker(network).pipeline.check(request(**changes))
    assert "\n" not in str(caught.value)
    assert network.calls == 0


class Holder:
    """A decoder as models/ makes them: a network in an attribute of an attribute."""

    def __init__(self) -> None:
        self.vae = nn.Linear(2, 3)
        self.inner = ToyHolder(nn.BatchNorm1d(2))


@dataclasses.dataclass
class ToyHolder:
    network: nn.Module


def test_offloaded_networks_are_on_the_device_only_while_their_stage_runs() -> None:
    """The device is the CPU here; a copy stands for the move to the device."""
    holder = Holder()
    networks = networks_in(holder)
    assert networks == [holder.vae, holder.inner.network]
    tensors = [x for n in networks for x in (*n.parameters(), *n.buffers())]
    homes, values = [x.data_ptr() for x in tensors], [x.clone() for x in tensors]

    class Looking(Decoding):
        def forward(self, samples: list[Sample], run: RunContext) -> None:
            assert all(torch.equal(x, value) for x, value in zip(tensors, values, strict=True))
            assert not {x.data_ptr() for x in tensors} & set(homes)
            raise Cancelled

    stage = OffloadedStage(Looking(ToyDecoder()), networks, torch.device("cpu"))
    assert (stage.name, stage.reads, stage.writes) == ("decoding", Decoding.reads, Decoding.writes)
    with pytest.raises(Cancelled):
        stage.forward([], context())
    assert [x.data_ptr() for x in tensors] == homes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_networks_leave_the_gpu() -> None:
    holder, device = Holder(), torch.device("cuda")
    networks, seen = networks_in(holder), set[str]()

    class Looking(Decoding):
        def forward(self, samples: list[Sample], run: RunContext) -> None:
            seen.update(x.device.type for n in networks for x in (*n.parameters(), *n.buffers()))

    before = torch.cuda.memory_allocated()
    OffloadedStage(Looking(ToyDecoder()), networks, device).forward([], context())
    assert seen == {"cuda"}
    assert torch.cuda.memory_allocated() == before
