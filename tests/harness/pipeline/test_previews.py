"""Previews: which steps have one, what they show, and that the final image does not know of them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from harness.device.memory import ResidentMemory
from harness.messages import GenerationRequest, RankOutcome, RankReport, array, decode
from harness.parallel.mesh import RankPosition
from harness.pipeline.composed import ComposedPipeline
from harness.pipeline.decode import Decoding
from harness.pipeline.denoise import PREVIEW, Denoising, DenoisingOptions
from harness.pipeline.executor import SyncExecutor
from harness.pipeline.latents import LatentPreparation, seeded_noise, step_noise
from harness.pipeline.preview import decode_preview, preview_steps, to_png
from harness.pipeline.text import TextEncoding
from harness.pipeline.timesteps import TimestepPreparation
from harness.pipeline.validate import InputValidation, Limits
from harness.serving.worker import Worker
from models.components import LatentSpace
from schedulers.build import build
from schedulers.grid import Point
from schedulers.prediction import Estimate
from schedulers.settings import NoiseSchedulerSettings
from schedulers.solvers.base import SolverState
from tests.fixtures.toy_pipeline import FAMILIES, ToyDecoder, ToyEncoder, ToyNetwork, request


def worker(settings: NoiseSchedulerSettings, no_previews: str = "") -> Worker:
    scheduler, decoder = build(settings), ToyDecoder()
    stages = [
        TextEncoding(ToyEncoder),
        TimestepPreparation(scheduler, 8),
        LatentPreparation(LatentSpace(4, 2), scheduler),
        Denoising(ToyNetwork(), torch.float32, scheduler, options=DenoisingOptions(decoder=decoder)),
        Decoding(decoder),
    ]
    validation = InputValidation(Limits(8, 64 * 64, no_previews=no_previews), scheduler)
    pipeline = ComposedPipeline(validation, stages, SyncExecutor())  # type: ignore[arg-type]
    return Worker(pipeline, RankPosition(0, (1, 1, 1, 1, 1)), torch.device("cpu"), ResidentMemory())


def generate(
    requested: GenerationRequest, settings: NoiseSchedulerSettings
) -> tuple[list[np.ndarray], RankReport, list[tuple[int, int, bytes]]]:
    """Return the pixels, the report of the rank, and the previews."""
    shown: list[tuple[int, int, bytes]] = []
    frames = worker(settings).generate(
        requested, lambda stage, done, total: None, lambda: False, lambda *preview: shown.append(preview)
    )
    outcome = decode(frames)
    assert isinstance(outcome, RankOutcome)
    assert outcome.report is not None
    return [array(sample.pixels, frames) for sample in outcome.samples], outcome.report, shown


def estimates(settings: NoiseSchedulerSettings, steps: int, seed: int) -> list[Tensor]:
    """Return the last x0 estimate of each step, by the noise scheduler alone."""
    scheduler, network = build(settings), ToyNetwork()
    grid = scheduler.grid(steps, 4)
    x = scheduler.init_noise(seeded_noise(seed, (4, 8, 8))[None], grid)
    condition, state, found = ToyEncoder()(["red"]), SolverState(), []

    def denoise(x: Tensor, point: Point) -> Estimate:
        output = network(x * point.c_in, torch.tensor([point.tau], dtype=torch.float32), condition)
        estimate = scheduler.prediction.estimate(output, x, point)
        latest.append(estimate.x0)
        return estimate

    for i in range(grid.steps):
        latest: list[Tensor] = []
        x = scheduler.step(x, i, grid, denoise, state, lambda k: step_noise(seed, k, (4, 8, 8))[None])
        found.append(latest[-1])
    return found


@pytest.mark.parametrize(
    ("steps", "previews", "expected"),
    [
        (20, 3, {5, 10, 15}),
        (4, 3, {1, 2, 3}),
        (3, 3, {1, 2}),
        (2, 1, {1}),
        (1, 3, set()),
        (50, 0, set()),
        (9, 2, {3, 6}),
    ],
)
def test_previews_are_spread_evenly_and_none_comes_after_the_last_step(
    steps: int, previews: int, expected: set[int]
) -> None:
    assert preview_steps(steps, previews) == expected


@pytest.mark.parametrize("settings", FAMILIES, ids=lambda settings: f"{settings.family}-{settings.solver}")
def test_a_preview_is_the_decoded_x0_estimate_and_changes_no_bit_of_the_image(settings: NoiseSchedulerSettings) -> None:
    wanted = request(prompts=["red"], guidance=1.0, steps=5, batch_size=2, samples_per_prompt=3)
    plain, plain_report, none = generate(wanted, settings)
    images, report, shown = generate(request(**{**fields(wanted), "previews": 2}), settings)
    assert not none
    for with_previews, without in zip(images, plain, strict=True):
        assert np.array_equal(with_previews, without)
    assert [(done, total) for done, total, _ in shown] == [(2, 10), (3, 10)]  # two micro-batches of five steps
    by_hand = estimates(settings, 5, wanted.seed)
    for (done, _, png), step in zip(shown, (2, 3), strict=True):
        assert done == step
        expected = (ToyDecoder()(by_hand[step - 1])[0] * 255).round().byte().permute(1, 2, 0).numpy()
        found = np.asarray(Image.open(io.BytesIO(png))).astype(int)
        assert np.abs(found - expected).max() <= 1  # two rows share a forward, which may round otherwise
    assert report.network_evaluations[PREVIEW] == 2
    assert PREVIEW not in plain_report.networks_ms
    assert report.network_evaluations["decoder"] == plain_report.network_evaluations["decoder"]
    assert any("2 previews" in note for note in report.notes)
    assert not any("previews" in note for note in plain_report.notes)


def fields(wanted: GenerationRequest) -> dict[str, object]:
    return {name: getattr(wanted, name) for name in wanted.__struct_fields__}


def test_other_replicas_and_ranks_without_a_client_report_none() -> None:
    frames = worker(FAMILIES[0]).generate(
        request(prompts=["red"], previews=2), lambda stage, done, total: None, lambda: False
    )
    outcome = decode(frames)
    assert isinstance(outcome, RankOutcome)
    assert outcome.report is not None
    assert outcome.report.network_evaluations[PREVIEW] == 2  # it computes them, as its replica may share the decoder


def test_a_cancelled_request_has_no_further_preview() -> None:
    shown: list[int] = []
    frames = worker(FAMILIES[0]).generate(
        request(prompts=["red"], previews=3),
        lambda stage, done, total: None,
        lambda: bool(shown),
        lambda done, total, png: shown.append(done),
    )
    outcome = decode(frames)
    assert isinstance(outcome, RankOutcome)
    assert outcome.failure is not None
    assert (outcome.failure.kind, shown) == ("cancelled", [1])


def test_previews_are_refused_in_one_line_where_none_can_be_made() -> None:
    check = worker(FAMILIES[0], no_previews="model.offload=true has no decoder then").pipeline.check
    check(request())
    with pytest.raises(ValueError, match=r"^model.offload=true has no decoder then; ask for no previews"):
        check(request(previews=1))
    with pytest.raises(ValueError, match="previews=17; give 0 to 16"):
        worker(FAMILIES[0]).pipeline.check(request(previews=17))


def test_a_large_preview_is_made_small_and_keeps_its_aspect() -> None:
    pixels = decode_preview(ToyDecoder(), torch.randn(2, 4, 100, 300))
    assert pixels.shape == (3, 85, 256)
    assert Image.open(io.BytesIO(to_png(pixels))).size == (256, 85)


def test_the_preview_of_a_video_is_its_first_latent_frame() -> None:
    seen: list[Tensor] = []

    def decoder(latent: Tensor) -> Tensor:
        seen.append(latent)
        return latent[:, :3].movedim(2, 1).sigmoid()

    x0 = torch.randn(1, 4, 5, 8, 8)
    pixels = decode_preview(decoder, x0)
    assert [tuple(latent.shape) for latent in seen] == [(1, 4, 1, 8, 8)]
    assert torch.equal(pixels, x0[0, :3, 0].sigmoid())


def test_values_that_are_not_finite_make_a_black_pixel_and_no_failure() -> None:
    def decoder(latent: Tensor) -> Tensor:
        return torch.full((1, 3, 2, 2), float("nan"))

    pixels = decode_preview(decoder, torch.zeros(1, 4, 1, 1))
    assert pixels.isfinite().all()
    assert Image.open(io.BytesIO(to_png(pixels))).getpixel((0, 0)) == (0, 0, 0)
