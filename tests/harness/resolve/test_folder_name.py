"""A sweep names a job's folder by its overrides: readable, and never the same for two jobs on any disc."""

import itertools
import unicodedata
from pathlib import Path

import pytest

from harness.resolve.folder_name import folder_name

ALIKE = [
    ["request.prompt=fox"],
    ["request.prompt=Fox"],
    ['request.prompt="a/b"'],
    ['request.prompt="a.b"'],
    ['request.prompt="a_b"'],
    ['request.prompt="a\\\\b"'],
    ['request.prompt="a:b"'],
    ['request.prompt="é"'],
    ['request.prompt="e\u0301"'],
    ["request.prompt=" + "ä" * 500],
    ["request.prompt=" + "ä" * 501],
    ["request.prompt=" + "x" * 160],
    ["request.prompt=" + "x" * 161],
    ["scheduler/solver=heun"],
    ["scheduler.solver=heun"],
    [],
    ["request.prompt=what?"],
    ["request.prompt=what*"],
    ["request.steps=2", "request.seed=1"],
    ["request.steps=2", "request.seed=2"],
]


def on_any_disc(name: str) -> str:
    """Return what a disc keeps of a name that folds case and accents."""
    return unicodedata.normalize("NFC", name).casefold()


def test_two_sets_of_overrides_never_share_a_name() -> None:
    names = {on_any_disc(folder_name(overrides)) for overrides in ALIKE}
    names |= {on_any_disc(folder_name([f"request.prompt={folder_name(overrides)}"])) for overrides in ALIKE}
    assert len(names) == 2 * len(ALIKE)


def test_the_order_of_overrides_does_not_change_the_name() -> None:
    one, other = (folder_name(order) for order in itertools.permutations(["request.steps=2", 'request.prompt="A/b"']))
    assert one == other


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["scheduler/solver=heun", "request.steps=4"], "request.steps=4,scheduler.solver=heun"),
        (['request.prompt="red apple"', "request.guidance=1.5"], 'request.guidance=1.5,request.prompt="red apple"'),
        (["request.prompts=[fox,cat]", "~experiment"], "request.prompts=[fox,cat],~experiment"),
        ([], "as_composed"),
    ],
)
def test_ordinary_values_are_their_own_name(overrides: list[str], name: str) -> None:
    assert folder_name(overrides) == name


@pytest.mark.parametrize("overrides", ALIKE)
def test_a_name_is_one_part_of_a_path_that_a_disc_takes(tmp_path: Path, overrides: list[str]) -> None:
    name = folder_name(overrides)
    assert len(name.encode()) <= 255
    (tmp_path / name).mkdir()
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
