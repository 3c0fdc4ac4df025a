"""Every published checkpoint maps one to one: each name and shape of diffusers' network is one of ours."""

from pathlib import Path

import pytest

from models.registry import ARCHITECTURES, PUBLISHED
from tests.fixtures.models.parity import assert_names_map
from tests.fixtures.models.published import CHECKPOINTS, pair
from tests.models.published_table import BEGIN, END, table

PAGE = Path(__file__).parents[2] / "models" / "README.md"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_full_size_network_maps_one_to_one(name: str) -> None:
    found = pair(name)
    theirs = dict(found.theirs.state_dict())
    if found.names.pairs:
        assert_names_map(found.ours, theirs, found.names)
    else:  # diffusers' own class, in a wrapper
        mine = {key.partition(".")[2]: tuple(tensor.shape) for key, tensor in found.ours.state_dict().items()}
        assert mine == {key: tuple(tensor.shape) for key, tensor in theirs.items()}


def test_every_architecture_has_a_published_checkpoint() -> None:
    assert {pair(name).config.model.architecture for name in CHECKPOINTS} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_published_folder_has_configurations_and_no_weights(name: str) -> None:
    suffixes = {file.suffix for file in (PUBLISHED / name).rglob("*") if file.is_file()}
    assert suffixes == {".json"}
    assert (PUBLISHED / name / "model_index.json").is_file()
    assert (PUBLISHED / name / "scheduler" / "scheduler_config.json").is_file()


def test_the_readme_has_the_table_of_today() -> None:
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == table(), "run `make models`"
