"""A server whose denoiser is cached: requests at different steps share forwards, and their images do not change."""

import pytest

from harness.client.generator import DiffusionGenerator
from tests.fixtures.serving.batching import FLOOR, MIXED, connected, generate, info, rel_l2, serving

CACHES = {
    "first_block": ["cache=first_block", "cache.threshold=0.3"],
    "teacache": ["cache=teacache", "cache.threshold=0.3"],
    "guidance_skip": ["cache=guidance_skip"],
}


def generate_alone_and_together(engine: DiffusionGenerator) -> None:
    alone = {name: generate(engine, {name: MIXED[name]})[name] for name in ("a", "c", "e")}
    with connected(engine) as connection:
        before = info(connection)
        together = generate(engine, {name: MIXED[name] for name in alone})
        after = info(connection)
    assert after.evaluations - before.evaluations < 9 + 6 + 12
    for name, images in together.items():
        for image, expected in zip(images, alone[name], strict=True):
            assert rel_l2(image, expected) < FLOOR, name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single", "cfg2", "ulysses2"])
@pytest.mark.parametrize("cache", list(CACHES))
def test_an_image_does_not_depend_on_requests_that_share_its_forwards(cache: str, layout: str) -> None:
    with serving(*CACHES[cache], f"parallel={layout}", "serve.max_batch=4") as engine:
        generate_alone_and_together(engine)
