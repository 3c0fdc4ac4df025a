"""The plug-in of the page runs as the page says, and makes the bits of our Euler in all three families."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import harness.plugins
from harness.client.generator import DiffusionGenerator
from tests.fixtures.plugins import no_plugins_left

PAGE = Path(harness.plugins.__file__).with_name("README.md")
SMALL = (
    "launch.mode=inprocess",
    "launch.threads_per_rank=1",
    "request.prompts=[rocket]",
    "request.steps=3",
    "request.height=32",
    "request.width=32",
)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    with no_plugins_left():
        yield


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    """Return the page's plug-in, in a folder whose name Hydra's grammar would not take unquoted."""
    (block,) = re.findall(r"```python\n# my_solver\.py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    folder = tmp_path / "mine, and [more]"
    folder.mkdir()
    (folder / "my_solver.py").write_text(block)
    return str(folder / "my_solver.py")


def image(plugin: str, *overrides: str) -> np.ndarray:
    with DiffusionGenerator.from_config(*SMALL, *overrides, plugins=[plugin]) as generator:
        return generator.generate().pixels[0]


def test_the_plugin_of_the_page_changes_the_image_by_its_option(plugin: str) -> None:
    ours = image(plugin, "scheduler/solver=euler")
    assert np.array_equal(image(plugin, "scheduler/solver=my_solver"), ours)
    assert not np.array_equal(image(plugin, "scheduler/solver=my_solver", "plugin.my_solver.factor=0.9"), ours)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ddpm", "sgm"])
def test_it_makes_the_images_of_our_euler(plugin: str, family: str) -> None:
    images = [image(plugin, f"scheduler={family}", f"scheduler/solver={name}") for name in ("euler", "my_solver")]
    assert np.array_equal(*images)
