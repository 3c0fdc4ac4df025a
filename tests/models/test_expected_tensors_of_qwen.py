"""The tensors that a launcher expects of Qwen3 and Qwen2.5-VL are those that transformers builds and loads."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

from harness.resolve.compose import ConfigError, compose_run
from models.checkpoint import check_loading_info
from models.configs import qwen, text_encoders
from models.configs.options import RequiredRule
from models.files import CheckpointError, check_names_and_shapes
from models.registry import PUBLISHED, SIZED
from tests.fixtures.models import qwen_image, z_image

MODELS: dict[str, tuple[Any, Any]] = {
    "qwen3": (Qwen3Model, Qwen3Config),
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig),
}
RULES: dict[str, tuple[dict[str, RequiredRule], Any]] = {
    "qwen3": (dict(qwen.QWEN3_RULES), Qwen3Config),
    "language": (dict(qwen.LANGUAGE_RULES), Qwen2_5_VLTextConfig),
    "vision": (dict(qwen.VISION_RULES), Qwen2_5_VLVisionConfig),
}
SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN3 = SIZES | {"model_type": "qwen3", "head_dim": 6}
TEXT = SIZES | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 0, 0], "rope_theta": 1e4}}
VISION = {
    "depth": 2,
    "hidden_size": 6,
    "intermediate_size": 10,
    "num_heads": 2,
    "out_hidden_size": 8,
    "patch_size": 3,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
    "in_channels": 2,
}
VL: dict[str, Any] = {"model_type": "qwen2_5_vl", "text_config": TEXT, "vision_config": VISION}
SHIPPED = {
    f"{path.parent.parent.name}/{path.parent.name}": path
    for root in (PUBLISHED, SIZED)
    for path in sorted(root.glob("*/text_encoder/config.json"))
    if json.loads(path.read_text())["model_type"] in MODELS
}


def network(raw: dict[str, Any], device: str = "meta") -> torch.nn.Module:
    """Build a text encoder with transformers."""
    make, config = MODELS[raw["model_type"]]
    with torch.device(device):
        made: torch.nn.Module = make(config(**{name: value for name, value in raw.items() if name != "model_type"}))
    return made


def shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network(raw).state_dict().items()}


def check(raw: dict[str, Any], found: dict[str, tuple[int, ...]]) -> None:
    """Raise an error if a launcher refuses stored shapes."""
    expected = text_encoders.tensor_shapes(raw)
    assert expected is not None
    check_names_and_shapes(expected, text_encoders.as_published(found, expected, raw), "here")


# ---------------------------------------------------------------- the tables


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_expects_the_tensors_that_are_built(name: str) -> None:
    raw = json.loads(SHIPPED[name].read_text())
    expected = text_encoders.tensor_shapes(raw)
    assert expected is not None
    assert text_encoders.as_published(shapes(raw), expected, raw) == expected


def test_every_published_qwen_is_here() -> None:
    assert {"z_image/text_encoder", "z_image_turbo/text_encoder", "qwen_image/text_encoder"} <= set(SHIPPED)


@pytest.mark.parametrize(
    "raw",
    [
        QWEN3,
        QWEN3 | {"attention_bias": True},
        QWEN3 | {"num_key_value_heads": None},
        QWEN3 | {"num_hidden_layers": 3, "head_dim": 2, "tie_word_embeddings": True},
        {"model_type": "qwen3", "num_hidden_layers": 1},
        VL,
        VL | {"text_config": TEXT | {"num_key_value_heads": None, "num_attention_heads": 2}},
        VL | {"vision_config": VISION | {"spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 1}},
        {"model_type": "qwen2_5_vl", **TEXT, "vision_config": VISION},
        {"model_type": "qwen2_5_vl", **TEXT},
        VL | {"vocab_size": 99, "hidden_size": 99},
    ],
    ids=str,
)
def test_every_size_counts(raw: dict[str, Any]) -> None:
    expected = text_encoders.tensor_shapes(raw)
    assert expected is not None
    assert text_encoders.as_published(shapes(raw), expected, raw) == expected


@pytest.mark.parametrize("part", RULES)
def test_every_size_of_transformers_has_its_default_here(part: str) -> None:
    rules, config = RULES[part]
    defaults = {name: parameter.default for name, parameter in inspect.signature(config.__init__).parameters.items()}
    assert {name: default for name, (default, _) in rules.items()} == {name: defaults[name] for name in rules}
    assert all(values(default) for default, values in rules.values())
    assert set(config.attribute_map) <= set(qwen.OTHER_NAMES)


def test_another_name_of_a_size_is_left_to_the_ranks() -> None:
    assert text_encoders.tensor_shapes(VL | {"vision_config": VISION | {"num_hidden_layers": 3}}) is None


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (QWEN3 | {"head_dim": "wide"}, "head_dim='wide' does not fit; give a whole number above 0"),
        (QWEN3 | {"attention_bias": 1}, "attention_bias=1 does not fit; give true or false"),
        (QWEN3 | {"num_hidden_layers": 0}, "num_hidden_layers=0 does not fit; give a whole number above 0"),
        (
            VL | {"text_config": TEXT | {"num_key_value_heads": -1}},
            "text_config.num_key_value_heads=-1 does not fit; give a whole number above 0, or null",
        ),
        (
            VL | {"text_config": TEXT | {"num_attention_heads": 3}},
            "hidden_size=8 does not fit; give a multiple of num_attention_heads=3",
        ),
        (VL | {"vision_config": 3}, "vision_config=3 does not fit; give an object"),
        (
            VL | {"vision_config": VISION | {"patch_size": [14, 14]}},
            "vision_config.patch_size=[14, 14] does not fit; give a whole number above 0",
        ),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused(raw: dict[str, Any], line: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        text_encoders.tensor_shapes(raw)
    assert str(caught.value) == line


# ---------------------------------------------------------------- names that loaders accept


def stored_variants(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of an encoder as files of different ages and sources have them, and damaged ones."""
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    published = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in tensors.items()
    }
    first = next(iter(bare))
    found = {
        "as saved": tensors,
        "bare": bare,
        "published": published,
        "without the first": {name: t for name, t in bare.items() if name != first},
        "misshapen": bare | {first: torch.zeros(3, 5)},
        "stranger": published | {"stranger": torch.zeros(1)},
        "frequencies": published | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)},
        "frequencies of the tower": published | {"visual.rotary_pos_emb.inv_freq": torch.zeros(3)},
        "without a head": {name: t for name, t in tensors.items() if name != qwen.HEAD},
        "without an embedding": {n: t for n, t in published.items() if not n.endswith("embed_tokens.weight")},
        "another head": published | {qwen.HEAD: torch.zeros(20, 8)},
        "a head of another size": published | {qwen.HEAD: torch.zeros(19, 8)},
        "without a tower": {name: t for name, t in published.items() if "visual" not in name},
        "a layer too few": {name: t for name, t in published.items() if "layers.1." not in name},
        "a score": published | {"score.weight": torch.zeros(2, 8)},
        "language model alone": {name: t for name, t in bare.items() if name.startswith(("layers", "norm", "embed"))},
    }
    for prefix in ("model.", "model.model.", "language_model.", "transformer.", "model.language_model.", "visual."):
        found[f"prefix {prefix}"] = {prefix + name: tensor for name, tensor in bare.items()}
    return found


def loads(raw: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bool:
    """Return whether the loader accepts tensors, as models.text.load calls it."""
    make, config = MODELS[raw["model_type"]]
    try:
        _, found = make.from_pretrained(
            None,
            config=config(**{name: value for name, value in raw.items() if name != "model_type"}),
            state_dict=dict(tensors),
            output_loading_info=True,
        )
        check_loading_info(found, Path())
    except (CheckpointError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize(
    "raw", [QWEN3, VL, VL | {"tie_word_embeddings": True}], ids=["qwen3", "qwen2_5_vl", "qwen2_5_vl-tied"]
)
def test_names_pass_as_the_loader_accepts_them(raw: dict[str, Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in network(raw, "cpu").state_dict().items()}
    accepted = []
    for what, stored in stored_variants(tensors).items():
        sizes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        if loads(raw, stored):
            accepted.append(what)
            check(raw, sizes)
        else:
            with pytest.raises(CheckpointError):
                check(raw, sizes)
    assert {"as saved", "bare", "published", "frequencies"} <= set(accepted)
    assert len(accepted) < 16


def test_a_whole_qwen3_with_a_head_is_refused_as_its_loader_refuses_it() -> None:
    whole = Qwen3ForCausalLM(Qwen3Config(**{name: value for name, value in QWEN3.items() if name != "model_type"}))
    tensors = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    assert not loads(QWEN3, tensors)
    with pytest.raises(CheckpointError, match=r"unexpected lm_head\.weight"):
        check(QWEN3, {name: tuple(tensor.shape) for name, tensor in tensors.items()})


# ---------------------------------------------------------------- before ranks start

CHECKPOINTS: dict[str, Callable[[Path], None]] = {"z_image_turbo": z_image.save, "qwen_image": qwen_image.save}


@pytest.mark.parametrize(
    ("name", "stored", "tensor"),
    [
        ("z_image_turbo", "layers.1.self_attn.q_norm.weight", "model.layers.1.self_attn.q_norm.weight"),
        ("qwen_image", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("qwen_image", "visual.merger.mlp.2.bias", "visual.merger.mlp.2.bias"),
    ],
)
def test_a_tensor_of_another_name_or_shape_is_refused_before_ranks_start(
    name: str, stored: str, tensor: str, tmp_path: Path
) -> None:
    CHECKPOINTS[name](tmp_path)
    overrides = [f"model={name}", f"model.path={tmp_path}"]
    compose_run(overrides)
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    kept = tensors.pop(stored)
    start = f"{file.parent} (sizes of {file.parent / 'config.json'}): the weights do not fit the network: "
    for changed, fault in (
        (tensors, f"missing {tensor}"),
        (tensors | {stored: torch.zeros(3)}, f"{tensor} is (3,), the network has {tuple(kept.shape)}"),
        (tensors | {stored: kept, "stranger": torch.zeros(1)}, "unexpected stranger"),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ConfigError) as caught:
            compose_run(overrides)
        assert f"{start}{fault}" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", ["checkpoint", "dummy"])
def test_a_value_in_a_file_is_refused_before_ranks_start(load: str, tmp_path: Path) -> None:
    z_image.save(tmp_path)
    path = tmp_path / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 3.5}))
    with pytest.raises(ConfigError) as caught:
        compose_run(["model=z_image_turbo", f"model.path={tmp_path}", f"model.load={load}"])
    assert f"{path}: intermediate_size=3.5 does not fit; give a whole number above 0" in str(caught.value)
