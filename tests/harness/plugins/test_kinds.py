"""The kinds of models/ and harness/ that a plug-in adds: what repeats ours makes the same bits."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from harness.client.generator import DiffusionGenerator, Generation
from harness.config.kinds import METRICS, register_stage
from harness.loggers.table import print_record
from harness.records.record import Record
from harness.resolve.compose import ConfigError, compose_run
from harness.serving.policy import TrackedRequest, serving_order, sort_key
from harness.serving.turns import Turns
from models.attention import backend, math_attention, resolved_name
from models.attention.reference import MATH
from models.registry import register_attention_backend
from schedulers.registry import owned_by
from tests.fixtures.plugins import EXAMPLE, no_plugins_left
from tests.fixtures.toy_pipeline import request

LOADED = "plugins=[triptych_example]"
SMALL = (
    LOADED,
    "launch.mode=inprocess",
    "launch.threads_per_rank=1",
    "request.prompts=[rocket,sun]",
    "request.steps=4",
    "request.height=32",
    "request.width=32",
)


@pytest.fixture(autouse=True)
def _example(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the example importable, and forget it after the test."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    with no_plugins_left():
        yield


def generate(*overrides: str) -> tuple[Generation, Record]:
    with DiffusionGenerator.from_config(*SMALL, *overrides) as generator:
        generation = generator.generate()
        return generation, generation.record


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        compose_run([LOADED, *overrides])
    line = str(error.value)
    assert "\n" not in line
    return line


PAIRS = {
    "attention": (["attention=example_math"], ["attention=math"]),
    "architecture": (["model.architecture=example_pixart"], []),
    "cache": (
        ["cache=example_cache", "cache.order=1", "cache.warmup=2", "cache.interval=2"],
        ["cache=taylorseer", "cache.warmup=2", "cache.interval=2"],
    ),
    "guidance": (
        ["model.guidance_rule=example_guidance", "plugin.example_guidance.factor=0.5", "request.guidance=3"],
        ["request.guidance=1.5"],
    ),
}


@pytest.mark.parametrize("kind", list(PAIRS))
def test_what_repeats_ours_makes_the_same_bits(kind: str) -> None:
    (own, record), (ours, expected) = (generate(*overrides) for overrides in PAIRS[kind])
    for one, other in zip(own.pixels, ours.pixels, strict=True):
        assert np.array_equal(one, other)
    assert (record.attention.resolved == "example_math") == (kind == "attention")
    assert (record.statistics.cache is not None) == (kind == "cache")
    assert record.statistics.cache == expected.statistics.cache


def test_a_stage_is_seen_in_the_image_and_in_the_record(tmp_path: Path) -> None:
    plain, plain_record = generate("quality.metrics=[example_brightness]")
    dark, record = generate(
        "stages=[example_invert]", "plugin.example_invert.share=0.75", "quality.metrics=[example_brightness]"
    )
    for one, other in zip(dark.pixels, plain.pixels, strict=True):
        np.testing.assert_allclose(one, other + 0.75 * (1 - 2 * other), atol=1e-6)
    stages = [stage.name for stage in dark.result.ranks[0].stages]
    assert stages[-2:] == ["decoding", "example_invert"]
    assert record.statistics.stage_ms["example_invert"].median > 0
    assert "example_invert" not in plain_record.statistics.stage_ms
    found = record.metrics
    assert found == {"example_brightness": np.mean([np.asarray(image).mean() for image in dark.images])}
    assert found["example_brightness"] != plain_record.metrics["example_brightness"]
    console = Console(record=True, width=120)
    print_record(record, tmp_path, console)
    assert f"example brightness {found['example_brightness']:.4g}" in console.export_text()


def test_an_engine_of_a_plug_in_generates() -> None:
    found, record = generate("engine=example_grey")
    assert all(np.all(image == 0.5) for image in found.pixels)
    assert record.engine.name == "example_grey"


def fail(images: object, prompts: object) -> float:
    raise KeyError("no such weights")


@pytest.mark.parametrize(
    ("metric", "note"),
    [(fail, "KeyError: 'no such weights'"), (lambda images, prompts: float("nan"), "it returned nan")],
)
def test_a_metric_that_fails_is_a_note(metric: object, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compose_run([LOADED])
    with monkeypatch.context() as patch:
        patch.setitem(METRICS._entries, "example_brightness", metric)
        _, record = generate("quality.metrics=[example_brightness]")
    assert record.metrics == {}
    assert any(note in line for line in record.notes)


def test_an_attention_backend_says_what_it_takes() -> None:
    compose_run([LOADED])
    with owned_by("triptych_example"):
        register_attention_backend("example_narrow", MATH, masks=False, dtypes=("bfloat16",))
    assert "computes in bfloat16, and model.dtype=float32" in refused("attention.backend=example_narrow")
    masked = refused("attention.backend=example_narrow", "model.dtype=bfloat16")
    assert "takes no mask, and model=emoji masks padded text; use attention=sdpa" in masked
    q, mask = torch.randn(1, 4, 2, 8), torch.ones(1, 4, dtype=torch.bool)
    assert torch.equal(backend("example_narrow").attend(q, q, q), math_attention(q, q, q))
    with pytest.raises(ValueError, match="takes no mask, and this network masks keys"):
        backend("example_narrow").attend(q, q, q, mask)
    with pytest.raises(NotImplementedError, match="example_math runs on cpu, not on cuda; use attention=sdpa"):
        resolved_name("example_math", "cuda")


def accepted(name: str, arrived: float) -> TrackedRequest:
    return TrackedRequest(b"", request(request_id=name), arrived, 1e9)


def test_a_request_policy_orders_requests() -> None:
    compose_run([LOADED, "task=serve", "serve.policy=example_last"])
    waiting = [accepted("a", 1.0), accepted("b", 2.0), accepted("c", 3.0)]

    def order(policy: str) -> list[str]:
        return [tracked.request.request_id for tracked in serving_order(waiting, Turns(), sort_key(policy))]

    assert order("example_last") == order("fifo")[::-1] == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["stages=[example_invert,example_invert]"], "stages names example_invert twice"),
        (["stages=[example_invrt]"], "stages=example_invrt is not one of example_invert; did you mean example_invert?"),
        (["quality.metrics=[example_brightnes]"], "did you mean example_brightness?"),
        (["stages=[example_invert]", "plugin.example_invert.share=2"], "plugin.example_invert.share=2.0; give 0 to 1"),
        (["cache=example_cache", "parallel=cfg2"], "cache.name=example_cache does not go with parallel.cfg=2"),
        (["model.guidance_rule=example_guidance", "engine=diffusers"], "which guides by itself; use engine=native"),
        (["engine=example_grey", "parallel=dp2"], "parallel"),
        (["engine=example_grey", "task=serve"], "set serve.max_batch=1"),
        (["engine=example_grey", "attention=math"], "attention=math does not run in engine=example_grey; choose auto"),
        (["engine=example_grey", "engine.optimize=compile"], "use engine.optimize=none"),
        (["serve.policy=example_lst", "task=serve"], "did you mean example_last?"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(overrides: list[str], line: str) -> None:
    assert line in refused(*overrides)


def test_a_rule_without_effect_is_said() -> None:
    notes = compose_run([LOADED, "model.guidance_rule=example_guidance", "request.guidance=1"]).notes
    assert any("model.guidance_rule=example_guidance has no effect" in note for note in notes)


def test_a_stage_has_one_place() -> None:
    with pytest.raises(ValueError, match="give before=STAGE or after=STAGE"):
        register_stage("nowhere", "triptych_example.parts:Invert")
    with pytest.raises(ValueError, match="has the name of a stage of every pipeline"):
        register_stage("decoding", "triptych_example.parts:Invert", before="denoising")
