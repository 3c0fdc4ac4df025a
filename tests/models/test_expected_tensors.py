"""The tensors that a launcher expects of a checkpoint are those of the network that the ranks build."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models import dit, flux, pixart, qwen_image, sd3, wan, z_image
from models.configs import dit as dit_config
from models.configs import flux as flux_config
from models.configs import pixart as pixart_config
from models.configs import qwen_image as qwen_config
from models.configs import sd3 as sd3_config
from models.configs import wan as wan_config
from models.configs import z_image as z_config
from models.files import CheckpointError
from models.registry import PUBLISHED, REFERENCE, SIZED

FAMILIES: dict[str, tuple[Any, Any, Callable[..., torch.nn.Module]]] = {
    "dit": (dit, dit_config, dit.DiT),
    "flux": (flux, flux_config, flux.Flux),
    "pixart": (pixart, pixart_config, pixart.PixArt),
    "qwen": (qwen_image, qwen_config, qwen_image.QwenImage),
    "sd3": (sd3, sd3_config, sd3.SD3),
    "wan": (wan, wan_config, wan.Wan),
    "z": (z_image, z_config, z_image.ZImage),
}
FOLDERS = {
    folder.parent.name if folder.name == "transformer" else f"{folder.parent.name}/{folder.name}": folder
    for root in (PUBLISHED, SIZED, REFERENCE)
    for folder in sorted(path.parent for path in root.glob("*/transformer*/config.json"))
}


def family(name: str) -> tuple[Any, Any, Callable[..., torch.nn.Module]]:
    key = "pixart" if name.startswith("emoji") else "sd3" if name.startswith("sd3") else name.partition("_")[0]
    return FAMILIES[key]


def differences(
    package: Any, config: Any, make: Callable[..., torch.nn.Module], expected: dict[str, Any]
) -> dict[str, Any]:
    """Return the tensors in which the launcher's list and the network differ."""
    with torch.device("meta"):
        network = make(config)
    found = {package.NAMES.to_published(name): tuple(t.shape) for name, t in network.state_dict().items()}
    return dict(found.items() ^ expected.items())


@pytest.mark.parametrize("name", FOLDERS)
def test_every_shipped_configuration_expects_its_networks_tensors(name: str) -> None:
    package, configs, make = family(name)
    config = configs.read_config(FOLDERS[name])
    assert differences(package, config, make, configs.tensor_shapes(config)) == {}


@pytest.mark.parametrize(
    "name", ["flux", "sd35_medium", "pixart_alpha", "dit_256", "qwen_image", "z_image", "wan_1_3b"]
)
def test_any_value_of_an_option_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    configs = family(name)[1]
    raw = json.loads((FOLDERS[name] / "config.json").read_text())
    lines = []
    for key in {**getattr(configs, "DEFAULTS", {}), **raw, "norm_eps": 1e-6}:
        for value in (None, "x", -1, 0, 1.5, [], {}, True, [1, "a", 2], [0, 0, 0], float("nan")):
            (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
            try:
                configs.tensor_shapes(configs.read_config(tmp_path))
            except CheckpointError as error:
                lines.append(str(error))
    assert len(lines) > 50
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("flux", flux_config.FluxConfig(1, 2, 3, 8, 5, 7, 9, (2, 2, 4), True)),
        ("sd3", sd3_config.SD3Config(3, 2, 4, 5, 3, 6, 7, 9, 11, (0, 2), True)),
        ("sd3", sd3_config.SD3Config(2, 2, 4, dual=(1,))),
        ("pixart", pixart_config.PixArtConfig(2, 3, 4, 5, 10, 3, text_channels=7, size_conditioning=True)),
        ("dit", dit_config.DiTConfig(2, 3, 4, 5, 10, 3, classes=7)),
        ("qwen", qwen_config.QwenImageConfig(2, 3, 8, 5, 7, (2, 2, 4))),
        ("z", z_config.ZImageConfig(2, 1, 3, 8, 5, 7, (2, 2, 4), qk_norm=False)),
        ("wan", wan_config.WanConfig(2, 3, 4, 13, 5, 3, 7, 6, cross_norm=False)),
    ],
    ids=["flux", "sd3", "sd3-plain", "pixart", "dit", "qwen_image", "z_image", "wan"],
)
def test_every_option_counts(name: str, config: Any) -> None:
    package, configs, make = FAMILIES[name]
    assert differences(package, config, make, configs.tensor_shapes(config)) == {}
