"""The tensors that a launcher expects of Wan's and Qwen-Image's autoencoders are those that diffusers builds."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from safetensors.torch import load_file, save_file

from harness.resolve.compose import ConfigError, compose_run
from models.configs import video_autoencoders
from models.configs.libraries import TABLES
from models.files import CheckpointError
from models.registry import PUBLISHED
from tests.fixtures.models import qwen_image
from tests.fixtures.models.wan import tiny_wan

CLASSES: dict[str, Any] = {"AutoencoderKLWan": AutoencoderKLWan, "AutoencoderKLQwenImage": AutoencoderKLQwenImage}
RULES = {
    "AutoencoderKLWan": video_autoencoders.WAN_RULES,
    "AutoencoderKLQwenImage": video_autoencoders.QWEN_IMAGE_RULES,
}
TINY: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 3,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, False],
    "latents_mean": [0.0] * 3,
    "latents_std": [1.0] * 3,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def built(kind: str, raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return what diffusers builds of a configuration."""
    with torch.device("meta"):
        network = CLASSES[kind].from_config(raw)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", ["wan_1_3b", "wan_14b", "qwen_image"])
def test_every_shipped_configuration_expects_the_tensors_that_are_built(name: str) -> None:
    raw = json.loads((PUBLISHED / name / "vae" / "config.json").read_text())
    assert TABLES[raw["_class_name"]](raw) == built(raw["_class_name"], raw)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_res_blocks": 3, "z_dim": 2, "latents_mean": [0.0] * 2, "latents_std": [1.0] * 2},
        {"attn_scales": [1.0, 0.25]},
        {"temperal_downsample": [False, True]},
        {"dim_mult": [1, 3], "temperal_downsample": [False, True, True]},
        {"dim_mult": [2], "temperal_downsample": []},
        {"base_dim": 5, "dim_mult": [1, 2, 3]},
    ],
    ids=str,
)
def test_every_option_of_both_classes_counts(kind: str, options: dict[str, Any]) -> None:
    raw = TINY | options
    assert TABLES[kind](raw) == built(kind, raw)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("AutoencoderKLWan", {"in_channels": 4, "out_channels": 5}),
        ("AutoencoderKLWan", {"decoder_base_dim": 6}),
        ("AutoencoderKLWan", {"is_residual": True}),
        ("AutoencoderKLWan", {"is_residual": True, "decoder_base_dim": 8, "in_channels": 12, "patch_size": 2}),
        ("AutoencoderKLWan", {"is_residual": True, "num_res_blocks": 2, "temperal_downsample": [False, True]}),
        ("AutoencoderKLWan", {"is_residual": True, "attn_scales": [1.0]}),
        ("AutoencoderKLQwenImage", {"input_channels": 4}),
    ],
    ids=str,
)
def test_every_option_of_one_class_counts(kind: str, options: dict[str, Any]) -> None:
    raw = TINY | options
    assert TABLES[kind](raw) == built(kind, raw)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_option_of_diffusers_has_its_default_here(kind: str) -> None:
    parameters = inspect.signature(CLASSES[kind].__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    assert defaults.keys() == RULES[kind].keys() | set(video_autoencoders.WITHOUT_EFFECT)
    assert {name: default for name, (default, _) in RULES[kind].items()} == {n: defaults[n] for n in RULES[kind]}
    assert TABLES[kind]({}) == built(kind, {})
    assert built(kind, TINY | {"dropout": 0.5}) == built(kind, TINY) == TABLES[kind](TINY | {"dropout": 0.5})


@pytest.mark.parametrize("kind", CLASSES)
def test_an_option_of_another_version_is_left_to_the_ranks(kind: str) -> None:
    assert TABLES[kind](TINY | {"option_of_tomorrow": 1}) is None


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"base_dim": "wide"}, "base_dim='wide' does not fit; give a whole number above 0"),
        ({"z_dim": 0}, "z_dim=0 does not fit; give a whole number above 0"),
        ({"dim_mult": [1, 0.5, 2]}, "dim_mult=[1, 0.5, 2] does not fit; give a list of whole numbers above 0"),
        ({"attn_scales": ["a"]}, "attn_scales=['a'] does not fit; give a list of numbers"),
        ({"latents_std": [float("nan")] * 3}, "latents_std=[nan, nan, nan] does not fit; give a list of numbers"),
        ({"temperal_downsample": [1, 0]}, "temperal_downsample=[1, 0] does not fit; give a list of true or false"),
        (
            {"temperal_downsample": [True]},
            "temperal_downsample=[True] does not fit; give 2 values, one less than dim_mult has",
        ),
        ({"latents_mean": [0.0] * 4}, "latents_mean=[0.0, 0.0, 0.0, 0.0] does not fit; give 3 numbers, as z_dim says"),
        ({"latents_std": [1.0] * 16}, f"latents_std={str([1.0] * 16)[:60]}... does not fit; give 3 numbers"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused(kind: str, options: dict[str, Any], line: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        TABLES[kind](TINY | options)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize("multiples", [[1, 3], [3, 1], [2, 3, 1], [1, 2, 4, 4], [5, 2]], ids=str)
@pytest.mark.parametrize("over_time", [True, False])
def test_a_shortcut_that_does_not_divide_is_refused_as_diffusers_does(multiples: list[int], over_time: bool) -> None:
    raw = TINY | {"is_residual": True, "dim_mult": multiples, "temperal_downsample": [over_time] * len(multiples)}
    try:
        expected = built("AutoencoderKLWan", raw)
    except (ValueError, AssertionError):
        with pytest.raises(CheckpointError, match="is_residual=True does not fit; give false: "):
            TABLES["AutoencoderKLWan"](raw)
    else:
        assert TABLES["AutoencoderKLWan"](raw) == expected


# ---------------------------------------------------------------- before ranks start

CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "wan_1_3b": lambda folder: tiny_wan().save_pretrained(folder),
    "qwen_image": qwen_image.save,
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    CHECKPOINTS[request.param](folder)
    return request.param, folder


def refused(name: str, folder: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_run([f"model={name}", f"model.path={folder}", *overrides])
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_tensor_of_another_name_or_shape_is_refused_before_ranks_start(checkpoint: tuple[str, Path]) -> None:
    name, folder = checkpoint
    compose_run([f"model={name}", f"model.path={folder}"])
    file = folder / "vae" / WEIGHTS
    before, tensors = file.read_bytes(), load_file(file)
    tensor = "decoder.up_blocks.1.resnets.0.conv1.weight"
    kept = tensors.pop(tensor)
    start = f"{file.parent} (sizes of {file.parent / 'config.json'}): the weights do not fit the network: "
    try:
        save_file(tensors | {"stranger": kept}, file)
        assert f"{start}missing {tensor}; unexpected stranger" in refused(name, folder)
        save_file(tensors | {tensor: torch.zeros(3)}, file)
        assert f"{start}{tensor} is (3,), the network has {tuple(kept.shape)}" in refused(name, folder)
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("load", ["checkpoint", "dummy"])
def test_a_value_in_a_file_is_refused_before_ranks_start(checkpoint: tuple[str, Path], load: str) -> None:
    name, folder = checkpoint
    path = folder / "vae" / "config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | {"num_res_blocks": None}))
        line = refused(name, folder, f"model.load={load}")
        assert f"{path}: num_res_blocks=None does not fit; give a whole number above 0" in line
    finally:
        path.write_text(before)
    compose_run([f"model={name}", f"model.path={folder}", f"model.load={load}"])
