"""engine=diffusers and engine=native: the same pictures and the same counts from the same request, family by family."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.client import DiffusionGenerator
from harness.compose import ConfigError, compose_run
from harness.engine import RequestFailed
from harness.inprocess import InprocessEngine
from harness.records import Record
from models.registry import REFERENCE
from tests.models import (
    test_dit_pipeline,
    test_flux_pipeline,
    test_pixart_pipeline,
    test_qwen_image_pipeline,
    test_sd3_pipeline,
    test_unet_pipeline,
    test_z_image_pipeline,
)
from tests.models.wan_checkpoint import tiny_wan

BOUND = 1e-4  # of pixels in [0, 1]; both run in float32
SHORT = ("model.text.tokens=20",)
PATCHES = ("model.size_multiple=4",)
SIZE = {"height": 48, "width": 32}
PROMPTS = ["a red fox", "two small boats"]


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint, and what a run of it is told.

    Args:
        model: the option of group model.
        save: writes the checkpoint to a folder.
        overrides: beside the folder and float32.
        asked: of every request.
        steps: denoising steps that a request of 3 takes in evaluations.
    """

    model: str
    save: Callable[[Path], object]
    overrides: tuple[str, ...]
    asked: dict[str, Any]
    evaluations: int = 3


CASES = {
    "dit": Case(
        "dit_256",
        test_dit_pipeline.save,
        (*PATCHES, "model.height=16", "model.width=16", "model.examples=[cock]"),
        {"prompts": ["cock", "999"], "height": 16, "width": 16, "negative_prompt": ""},
    ),
    "pixart_alpha": Case(
        "pixart_alpha", lambda folder: test_pixart_pipeline.save(folder, "pixart_alpha"), (*PATCHES, *SHORT), SIZE
    ),
    "pixart_sigma": Case(
        "pixart_sigma", lambda folder: test_pixart_pipeline.save(folder, "pixart_sigma"), (*PATCHES, *SHORT), SIZE
    ),
    "sd3": Case("sd3", lambda folder: test_sd3_pipeline.checkpoint(folder, False), (*PATCHES, *SHORT), SIZE),
    "sd35_medium": Case(
        "sd35_medium", lambda folder: test_sd3_pipeline.checkpoint(folder, True), (*PATCHES, *SHORT), SIZE
    ),
    "flux": Case("flux", lambda folder: test_flux_pipeline.checkpoint(folder, True), (*PATCHES, *SHORT), SIZE),
    "flux_schnell": Case(
        "flux_schnell", lambda folder: test_flux_pipeline.checkpoint(folder, False), (*PATCHES, *SHORT), SIZE
    ),
    "qwen_image": Case("qwen_image", test_qwen_image_pipeline.save, ("model.text.tokens=40",), SIZE),
    "z_image": Case("z_image_turbo", test_z_image_pipeline.save, ("model.text.tokens=48",), SIZE),
    "wan": Case(
        "wan_1_3b",
        lambda folder: tiny_wan().save_pretrained(folder),
        ("model.text.tokens=24",),
        {"height": 32, "width": 16, "frames": 5},
    ),
    "sd15": Case("sd15", lambda folder: test_unet_pipeline.sd("sd15").save_pretrained(folder), (), SIZE, evaluations=4),
    "sd21": Case("sd21", lambda folder: test_unet_pipeline.sd("sd21").save_pretrained(folder), (), SIZE),
    "sdxl": Case("sdxl", lambda folder: test_unet_pipeline.sdxl().save_pretrained(folder), (), SIZE),
}


def generator(*overrides: str) -> DiffusionGenerator:
    process = ["launch.mode=inprocess", "launch.threads_per_rank=1", "logger=json"]
    config = compose_run([*process, *overrides]).config
    return DiffusionGenerator(config, InprocessEngine(config))


@dataclass(frozen=True)
class Pair:
    """Both engines over one checkpoint."""

    case: Case
    native: DiffusionGenerator
    peer: DiffusionGenerator

    def draw(self, **changes: Any) -> tuple[list[np.ndarray], Record, Record]:
        """The largest differences of pixels, checked to be of pictures, and both records."""
        asked = {"prompts": PROMPTS, "negative_prompt": "blurry", "seed": 7, "steps": 3} | self.case.asked | changes
        ours, theirs = self.native.generate(**asked), self.peer.generate(**asked)
        apart = []
        for mine, other in zip(ours.pixels, theirs.pixels, strict=True):
            assert mine.shape == other.shape
            assert other.std() > 0.01, "a flat picture proves nothing"
            apart.append(np.abs(mine - other).max())
        return apart, ours.record, theirs.record


def overrides_of(case: Case, folder: Path) -> list[str]:
    return [f"model={case.model}", f"model.path={folder}", "model.dtype=float32", *case.overrides]


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    case, folder = CASES[request.param], tmp_path_factory.mktemp(request.param)
    case.save(folder)
    own = overrides_of(case, folder)
    with generator(*own) as native, generator(*own, "engine=diffusers") as peer:
        yield Pair(case, native, peer)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_guided_pictures_are_the_native_ones(pair: Pair, batch_size: int) -> None:
    apart, ours, theirs = pair.draw(guidance=3.5, batch_size=batch_size)
    assert max(apart) < BOUND
    assert ours.summary.nfe == theirs.summary.nfe == pair.case.evaluations
    assert [s.name for s in ours.repeats[0].steps] == [s.name for s in theirs.repeats[0].steps]
    assert len(ours.repeats[0].denoise_steps_ms) == len(theirs.repeats[0].denoise_steps_ms) == 6 // batch_size
    assert ours.repeats[0].networks_ms.keys() == theirs.repeats[0].networks_ms.keys()
    assert 0 < theirs.summary.overhead_share.median < 1


def test_pictures_without_guidance_are_the_native_ones(pair: Pair) -> None:
    apart, ours, theirs = pair.draw(guidance=1.0, negative_prompt="", prompts=pair.case.asked.get("prompts", PROMPTS))
    assert max(apart) < BOUND
    assert ours.summary.nfe == theirs.summary.nfe


def test_the_record_names_who_drew(pair: Pair) -> None:
    _, ours, theirs = pair.draw()
    assert (ours.engine.name, theirs.engine.name) == ("native", "diffusers")
    assert theirs.engine.version == theirs.provenance.packages["diffusers"]
    assert ours.fingerprint != theirs.fingerprint
    assert {part.component for part in ours.loaded} == {part.component for part in theirs.loaded}
