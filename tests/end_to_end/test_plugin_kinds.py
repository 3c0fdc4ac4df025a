"""Kinds of a plug-in on two ranks, and in a server whose requests share forwards."""

import numpy as np
import pytest

from harness.client.generator import DiffusionGenerator, Generation
from tests.fixtures.plugins import EXAMPLE
from tests.fixtures.serving.batching import FLOOR, MIXED, connected, generate, info, rel_l2, serving

OWN = ("plugins=[triptych_example]", "stages=[example_invert]", "model.guidance_rule=example_guidance")
TWO = ("launch.threads_per_rank=1", "request.prompt=rocket", "request.steps=6", "parallel=ulysses2")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))


def made(*overrides: str) -> Generation:
    with DiffusionGenerator.from_config(*TWO, *overrides) as generator:
        return generator.generate()


@pytest.mark.slow
def test_two_ranks_run_what_a_plug_in_adds() -> None:
    own = made(*OWN, "attention=example_math", "cache=example_cache", "cache.order=1", "cache.warmup=3")
    ours = made("attention=math", "cache=taylorseer")
    assert np.array_equal(own.pixels[0], 1 - ours.pixels[0])
    assert [[stage.name for stage in rank.stages][-1] for rank in own.result.ranks] == ["example_invert"] * 2
    assert [rank.skips for rank in own.result.ranks] == [rank.skips for rank in ours.result.ranks]


@pytest.mark.slow
def test_requests_that_share_forwards_have_their_own_stages() -> None:
    chosen = {name: MIXED[name] for name in ("a", "c")}
    with serving(*OWN, "serve.max_batch=4", "serve.policy=example_last") as engine:
        alone = {name: generate(engine, {name: one})[name] for name, one in chosen.items()}
        with connected(engine) as connection:
            before = info(connection).evaluations
            together = generate(engine, chosen)
            assert info(connection).evaluations - before < 9 + 6
    for name, images in together.items():
        for image, expected in zip(images, alone[name], strict=True):
            assert rel_l2(image, expected) < FLOOR, name
