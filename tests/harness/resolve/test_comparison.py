"""The baseline and the candidate of a comparison: how they are written, and which runs they are."""

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from harness.resolve.comparison import quoted, split
from harness.resolve.compose import ConfigError, compose_run
from harness.tasks.compare import sides

PAIR = ["a=[]", "b=[parallel=dp2]"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("b=[parallel=dp2]", ["parallel=dp2"]),
        ("b=[parallel=dp2, attention=flash]", ["parallel=dp2", "attention=flash"]),
        ("b=['model.lora=[{path: x, weight: 1}]']", ["model.lora=[{path: x, weight: 1}]"]),
        ("b=[request.prompts=[rocket,pizza]]", ["request.prompts=[rocket,pizza]"]),
        ("b=[request.prompt='a \"b\", c']", ["request.prompt='a \"b\", c'"]),
        ("b=[]", []),
    ],
)
def test_comparisons_are_written_without_quotes(written: str, meant: list[str]) -> None:
    overrides = ["task=compare", "a=[]", written]
    assert compose_run(overrides).config.b == meant


def test_other_arguments_and_choices_of_comparisons_are_left_unchanged() -> None:
    assert quoted("request.prompt=[x=1]") == "request.prompt=[x=1]"
    assert quoted("b=null") == "b=null"
    assert quoted("b=[x=1],[y=2,z=3]") == 'b=["x=1"],["y=2","z=3"]'
    assert split("a,'b,c',[d,{e: f,g}]") == ["a", "'b,c'", "[d,{e: f,g}]"]


def test_each_configuration_is_a_bench_of_its_own() -> None:
    composed = compose_run(["task=compare", "request.steps=4", "task.repeats=9", *PAIR, "hydra.run.dir=somewhere"])
    a, b = sides(composed)
    for side in (a, b):
        assert (side.config.task.name.name, side.config.task.repeats, side.config.task.warmup) == ("bench", 9, 1)
        assert side.config.request.steps == 4
        assert (side.config.a, side.config.b) == (None, None)
    assert (a.config.parallel.dp, b.config.parallel.dp) == (1, 2)
    assert (a.folder.as_posix(), b.folder.as_posix()) == ("somewhere/a", "somewhere/b")


def test_a_job_of_a_sweep_composes_its_comparison_and_leaves_the_sweep_unchanged() -> None:
    composed = compose_run(["task=compare", *PAIR])
    with initialize_config_module("conf", version_base="1.3"):
        sweep = GlobalHydra.instance().hydra
        _, b = sides(composed)
        assert GlobalHydra.instance().hydra is sweep
    assert b.config.parallel.dp == 2


def test_the_overrides_of_one_configuration_win() -> None:
    composed = compose_run(
        ["task=compare", "parallel=dp4", "request.steps=4", "a=[request.steps=5]", "b=[parallel=dp2]"]
    )
    a, b = sides(composed)
    assert (a.config.parallel.dp, a.config.request.steps) == (4, 5)
    assert (b.config.parallel.dp, b.config.request.steps) == (2, 4)


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["task=compare"], "add a=[...] b=[...]"),
        (["task=compare", "a=[]"], "add b=[...]"),
        (["a=[]"], "with task=compare or load only"),
        (["task=compare", *PAIR, "task.repeats=5"], "needs 8 rounds or more"),
        (["task=compare", "a=[]", "b=[parallel.tp=3]"], "b=['parallel.tp=3']: parallel.tp=3 does not divide"),
        (["task=compare", "a=[]", "b=[paralel=dp2]"], "did you mean parallel?"),
        (["task=compare", *PAIR, "launch.mode=inprocess"], "use launch.mode=torchrun"),
    ],
)
def test_what_cannot_be_compared_is_refused(overrides: list[str], hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sides(compose_run(overrides))
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)
