"""The sides of images are refused before ranks start as the ranks would refuse them."""

from pathlib import Path

import pytest
import torch

from harness.baselines.build import native_components
from harness.build.common import source_of
from harness.resolve.compose import ConfigError, compose_run
from models.configs.image_sizes import largest_side, token_side
from models.files import read_json
from models.registry import PUBLISHED

MODELS = sorted(folder.name for folder in PUBLISHED.iterdir() if (folder / "model_index.json").is_file())


def config(folder: Path) -> dict[str, object]:
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


@pytest.mark.parametrize("model", MODELS)
def test_the_files_say_what_the_components_have(model: str) -> None:
    run = compose_run([f"model={model}", "model.load=dummy"])
    folders = [run.checkpoint.config_folder(name) for name in (run.denoiser, "vae")]
    network, vae = (config(folder) for folder in folders)
    parts = native_components(run.config.model.architecture, source_of(run, torch.device("cpu")))
    side = token_side(run.config.model.architecture, network, vae)
    assert side == parts.size_multiple
    assert largest_side(run.config.model.architecture, network, side) == parts.max_side


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["model=flux", "model.size_multiple=8"],
            "model.size_multiple=8, but this checkpoint generates multiples of 16",
        ),
        (["model=wan_1_3b", "model.size_multiple=4"], "model.size_multiple=4, but this checkpoint generates multiples"),
        (
            ["model=sd3", "model.max_pixels=16000000", "request.height=64", "request.width=3088"],
            "the request has 64 x 3088 pixels; this checkpoint has positions for 3072 per side",
        ),
        (
            ["model=wan_1_3b", "model.max_pixels=16000000", "request.height=16", "request.width=16400"],
            "the request has 16 x 16400 pixels; this checkpoint has positions for 16384 per side",
        ),
        (["model.size_multiple=1"], "model.size_multiple=1, but this checkpoint generates multiples of 8 pixels"),
    ],
)
def test_a_wrong_side_is_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run(["model.load=dummy", *overrides])
    assert str(caught.value).startswith(line)
