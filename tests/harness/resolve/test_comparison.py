"""The baseline and the candidate of a comparison: how they are written, and which runs they are."""

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from harness.resolve.comparison import quote_overrides, split_list
from harness.resolve.compose import ConfigError, compose_run
from harness.tasks import task_entry
from harness.tasks.common.comparison import comparison_runs

PAIR = ["compare.a=[]", "compare.b=[parallel=dp2]"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("compare.b=[parallel=dp2]", ["parallel=dp2"]),
        ("compare.b=[parallel=dp2, attention=flash]", ["parallel=dp2", "attention=flash"]),
        ("compare.b=['model.lora=[{path: x, weight: 1}]']", ["model.lora=[{path: x, weight: 1}]"]),
        ("compare.b=[request.prompts=[rocket,pizza]]", ["request.prompts=[rocket,pizza]"]),
        ("compare.b=[request.prompt='a \"b\", c']", ["request.prompt='a \"b\", c'"]),
        (r'compare.b=["request.prompt=\"a, b\"",parallel=dp2]', ['request.prompt="a, b"', "parallel=dp2"]),
        (r"compare.b=[request.prompt='it\'s, b']", [r"request.prompt='it\'s, b'"]),
        (r"compare.b=[request.prompt=a\,b,parallel=dp2]", [r"request.prompt=a\,b", "parallel=dp2"]),
        (r"compare.b=[model.path=C:\x]", [r"model.path=C:\x"]),
        (r'compare.b=[request.prompt="a\\b"]', [r'request.prompt="a\\b"']),
        ("compare.b=[]", []),
    ],
)
def test_comparisons_are_written_without_quotes(written: str, meant: list[str]) -> None:
    overrides = ["task=compare", "compare.a=[]", written]
    assert compose_run(overrides).config.compare.b == meant


def test_other_arguments_and_choices_of_comparisons_are_left_unchanged() -> None:
    assert quote_overrides("request.prompt=[x=1]") == "request.prompt=[x=1]"
    assert quote_overrides("compare.b=null") == "compare.b=null"
    assert quote_overrides("compare.b=[x=1],[y=2,z=3]") == 'compare.b=["x=1"],["y=2","z=3"]'
    assert split_list("a,'b,c',[d,{e: f,g}]") == ["a", "'b,c'", "[d,{e: f,g}]"]


def test_each_configuration_is_a_bench_of_its_own() -> None:
    composed = compose_run(["task=compare", "request.steps=4", "task.repeats=9", *PAIR, "hydra.run.dir=somewhere"])
    a, b = comparison_runs(composed)
    for side in (a, b):
        assert (side.config.task.name.name, side.config.task.repeats, side.config.task.warmup) == ("bench", 9, 1)
        assert side.config.request.steps == 4
        assert (side.config.compare.a, side.config.compare.b) == (None, None)
    assert (a.config.parallel.dp, b.config.parallel.dp) == (1, 2)
    assert (a.folder.as_posix(), b.folder.as_posix()) == ("somewhere/a", "somewhere/b")


def test_a_job_of_a_sweep_composes_its_comparison_and_leaves_the_sweep_unchanged() -> None:
    composed = compose_run(["task=compare", *PAIR])
    with initialize_config_module("conf", version_base="1.3"):
        sweep = GlobalHydra.instance().hydra
        _, b = comparison_runs(composed)
        assert GlobalHydra.instance().hydra is sweep
    assert b.config.parallel.dp == 2


def test_the_overrides_of_one_configuration_win() -> None:
    composed = compose_run(
        ["task=compare", "parallel=dp4", "request.steps=4", "compare.a=[request.steps=5]", "compare.b=[parallel=dp2]"]
    )
    a, b = comparison_runs(composed)
    assert (a.config.parallel.dp, a.config.request.steps) == (4, 5)
    assert (b.config.parallel.dp, b.config.request.steps) == (2, 4)


def compare(overrides: list[str]) -> None:
    run = compose_run(overrides)
    task_entry(run.config.task.name).check(run)
    comparison_runs(run)


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["task=compare"], "add compare.a=[...] compare.b=[...]"),
        (["task=compare", "compare.a=[]"], "add compare.b=[...]"),
        (["compare.a=[]"], "with task=compare or load only"),
        (["task=compare", *PAIR, "task.repeats=5"], "needs 8 rounds or more"),
        (
            ["task=compare", "compare.a=[]", "compare.b=[parallel.tp=3]"],
            "compare.b=['parallel.tp=3']: parallel.tp=3 does not divide",
        ),
        (["task=compare", "compare.a=[]", "compare.b=[paralel=dp2]"], "did you mean parallel?"),
        (["task=compare", *PAIR, "launch.mode=inprocess"], "use launch.mode=torchrun"),
    ],
)
def test_what_cannot_be_compared_is_refused(overrides: list[str], hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compare(overrides)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)
