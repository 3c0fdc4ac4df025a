"""Letters outside ASCII need no quotes on the command line, and a value that needs some is shown in them."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from harness.resolve.comparison import quote_overrides
from harness.resolve.compose import ConfigError, compose_run
from harness.resolve.names import check_names


@pytest.mark.parametrize(
    "prompt",
    ["ein Fuchs", "狐", "é", "ein Füchslein", "hello!", "l'été", "a: é", "a=é", "fox & hound; 3 > 2", "🦊"],
)
def test_a_prompt_in_any_language_is_the_prompt(prompt: str) -> None:
    assert compose_run([f"request.prompt={prompt}"]).config.request.prompts == [prompt]


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("request.prompt=狐,é,fox", 'request.prompt="狐","é",fox'),
        ("request.prompts=[狐, é,fox]", 'request.prompts=["狐", "é",fox]'),
        ("request.prompts=['狐, é',fox]", "request.prompts=['狐, é',fox]"),
        ("model.lora=[{path: é.bin, weight: 1}]", 'model.lora=[{path: "é.bin", weight: 1}]'),
        ("request.prompt=é\\, ö", 'request.prompt="é, ö"'),
        ("request.prompt=${oc.env:É}", "request.prompt=${oc.env:É}"),
        ("request.prompt=fox", "request.prompt=fox"),
        ("compare.b=[request.prompt=狐]", 'compare.b=["request.prompt=狐"]'),
    ],
)
def test_each_of_several_values_gets_its_own_quotes(argument: str, quoted: str) -> None:
    assert quote_overrides(argument) == quoted


@pytest.mark.parametrize("prompt", ["it's", "abc(", "狐 (fox)", 'a "b', "{x"])
def test_what_is_shown_in_quotes_is_the_value_when_a_shell_reads_it(prompt: str) -> None:
    with pytest.raises(ConfigError, match="to mean all of it as one text, write ") as refused:
        compose_run([f"request.prompt={prompt}"])
    assert "\n" not in str(refused.value)
    (argument,) = shlex.split(str(refused.value).partition("write ")[2])
    assert OverridesParser.create().parse_override(argument).value() == prompt


@pytest.mark.parametrize(
    ("argument", "hint"),
    [("fox", "KEY=VALUE"), ("request.prompt=\udcff", "not UTF-8"), ("requést.prompt=fox", "not a value")],
)
def test_what_no_quotes_mend_is_one_line(argument: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint) as refused:
        check_names([argument])
    assert str(refused.value).isprintable()
