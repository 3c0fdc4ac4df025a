"""Previews on real ranks: every layout shows the same ones, and no final image changes by a bit."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from harness.client.generator import DiffusionGenerator
from harness.messages import Array, GenerationResult, Progress, array
from harness.pipeline.denoise import PREVIEW
from tests.fixtures.serving.batching import connected, request, serving

pytestmark = pytest.mark.slow
STEPS, PREVIEWS = 8, 3


def generate(engine: DiffusionGenerator, name: str, **changes: object) -> tuple[list[Array], list[bytes], float]:
    """Return the images of a request, its previews, and the number that each rank computed, at most."""
    with connected(engine) as connection:
        wanted = {"steps": STEPS, "prompts": ["rocket", "pizza"], "batch_size": 2, "seed": 5} | changes
        connection.send(request(engine, name, **wanted))
        shown: list[bytes] = []
        while True:
            message, frames = connection.receive()
            if isinstance(message, Progress) and message.preview:
                shown.append(message.preview)
            if isinstance(message, GenerationResult):
                images = [array(sample.pixels, frames) for sample in message.samples]
                return images, shown, max(rank.network_evaluations.get(PREVIEW, 0) for rank in message.ranks)


@pytest.fixture(scope="module")
def alone() -> list[np.ndarray]:
    with serving("serve.max_batch=1") as engine:
        return [opened(png) for png in generate(engine, "a", previews=PREVIEWS)[1]]


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


@pytest.mark.parametrize("max_batch", [1, 4])
@pytest.mark.parametrize("layout", ["dp2", "cfg2", "ulysses2"])
def test_previews_of_every_layout(layout: str, max_batch: int, alone: list[np.ndarray]) -> None:
    with serving(f"parallel={layout}", f"serve.max_batch={max_batch}") as engine:
        plain, none, _ = generate(engine, "plain")
        images, shown, computed = generate(engine, "shown", previews=PREVIEWS)
        heun, _, _ = generate(engine, "heun", solver="heun")
    assert (none, len(shown), computed) == ([], PREVIEWS, PREVIEWS)
    for one, other in zip(images, plain, strict=True):
        assert np.array_equal(one, other)
    for png, expected in zip(shown, alone, strict=True):
        assert np.abs(opened(png) - expected).max() <= 1
    assert not np.array_equal(heun[0], plain[0])
