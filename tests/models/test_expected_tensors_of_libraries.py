"""The tensors that a launcher expects of diffusers' and transformers' networks are those that these build and load."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from harness.resolve.compose import ConfigError, compose_run
from models.checkpoint import check_loading_info
from models.configs import autoencoder_kl, text_encoders, unet_conditional, unet_unconditional
from models.configs.options import Values
from models.files import CheckpointError, check_names_and_shapes
from models.names import LEGACY_NAMES
from models.registry import PUBLISHED, REFERENCE, SIZED
from tests.fixtures.models import unet

WEIGHTS = "diffusion_pytorch_model.safetensors"
TABLES: dict[str, tuple[Any, Any]] = {
    "UNet2DConditionModel": (unet_conditional, UNet2DConditionModel),
    "UNet2DModel": (unet_unconditional, UNet2DModel),
    "AutoencoderKL": (autoencoder_kl, AutoencoderKL),
}
ENCODERS: dict[str, tuple[Any, Any]] = {
    "clip": (CLIPTextModel, CLIPTextConfig),
    "clip-projected": (CLIPTextModelWithProjection, CLIPTextConfig),
    "t5": (T5EncoderModel, T5Config),
    "umt5": (UMT5EncoderModel, UMT5Config),
}
RULES = {"clip": text_encoders.CLIP_RULES, "t5": text_encoders.T5_RULES, "umt5": text_encoders.UMT5_RULES}
SHIPPED = {
    f"{path.parent.parent.name}/{path.parent.name}": path
    for root in (PUBLISHED, SIZED, REFERENCE)
    for path in sorted(root.glob("*/*/config.json"))
    if {json.loads(path.read_text()).get(key) for key in ("_class_name", "model_type")}
    & {*TABLES, "clip_text_model", "t5", "umt5"}
}
TINY_CLIP = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 6,
    "max_position_embeddings": 7,
}
TINY_T5 = {
    "vocab_size": 20,
    "d_model": 8,
    "d_kv": 3,
    "d_ff": 10,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 4,
}
VAE: dict[str, Any] = {
    "block_out_channels": [4, 8, 12],
    "norm_num_groups": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}


def shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def built(kind: str, raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return what diffusers builds of a configuration."""
    with torch.device("meta"):
        return shapes(TABLES[kind][1].from_config(raw))


def encoder(kind: str, raw: dict[str, Any], device: str = "meta") -> torch.nn.Module:
    """Build a text encoder with transformers."""
    make, config = ENCODERS[kind]
    with torch.device(device):
        network: torch.nn.Module = make(config(**raw))
    return network


def raw_encoder(kind: str) -> dict[str, Any]:
    return TINY_CLIP if kind.startswith("clip") else TINY_T5


def typed(kind: str) -> dict[str, Any]:
    return {"model_type": "clip_text_model" if kind.startswith("clip") else kind}


def expected_of_encoder(kind: str, raw: dict[str, Any]) -> Any:
    return text_encoders.tensor_shapes(raw | typed(kind), kind == "clip-projected")


# ---------------------------------------------------------------- the tables


def test_every_published_component_is_here() -> None:
    assert {"sd15/unet", "sdxl/unet", "ncsnpp_church/unet", "flux/vae", "emoji/vae", "sd3/text_encoder_2"} < set(
        SHIPPED
    )
    assert len(SHIPPED) >= 48


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_expects_the_tensors_that_are_built(name: str) -> None:
    raw = json.loads(SHIPPED[name].read_text())
    if kind := raw.get("_class_name"):
        assert TABLES[kind][0].tensor_shapes(raw) == built(kind, raw)
        return
    kind = raw["model_type"].partition("_")[0]
    projected = raw["architectures"] == ["CLIPTextModelWithProjection"]
    found = shapes(encoder("clip-projected" if projected else kind, raw))
    expected = text_encoders.tensor_shapes(raw, projected)
    assert expected is not None
    assert text_encoders.as_published(found, expected, raw, projected) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        unet.SIZED,
        {"attention_head_dim": [1, 2, 3], "cross_attention_dim": [5, 6, 7], "layers_per_block": [1, 2, 3]},
        {"use_linear_projection": True, "transformer_layers_per_block": [1, 2, 3]},
        {"transformer_layers_per_block": [1, 2, 3], "reverse_transformer_layers_per_block": [2, 1, 4]},
        {"attention_head_dim": 3},  # which does not divide the channels
        {"only_cross_attention": True},
        {"only_cross_attention": [True, False, False], "layers_per_block": 2},
        {"mid_block_type": "UNetMidBlock2D"},
        {"mid_block_type": None},
        {"resnet_time_scale_shift": "scale_shift", "time_embedding_dim": 14},
        {"time_embedding_type": "fourier"},
        {"time_embedding_type": "fourier", "time_embedding_dim": 14},
        {"encoder_hid_dim": 9},
        {"encoder_hid_dim": 9, "encoder_hid_dim_type": "text_proj"},
        {"conv_in_kernel": 5, "conv_out_kernel": 1, "in_channels": 3, "out_channels": 7},
        {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"]},
    ],
    ids=str,
)
def test_every_option_of_a_conditional_unet_counts(options: dict[str, Any]) -> None:
    raw = (unet.SIZED if "addition_embed_type" in options else unet.SMALL) | options
    assert unet_conditional.tensor_shapes(raw) == built("UNet2DConditionModel", raw)


@pytest.mark.parametrize("base", [unet.PLAIN, unet.NCSNPP], ids=["plain", "ncsnpp"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers_per_block": 3, "attention_head_dim": 3, "in_channels": 1, "out_channels": 2},
        {"mid_block_type": None},
        {"add_attention": False},
        {"downsample_type": "resnet", "upsample_type": "resnet"},
        {"resnet_time_scale_shift": "scale_shift"},
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4, "time_embedding_dim": 10},
        {"time_embedding_type": "fourier"},
        {"time_embedding_type": "positional"},
    ],
    ids=str,
)
def test_every_option_of_an_unconditional_unet_counts(base: dict[str, Any], options: dict[str, Any]) -> None:
    raw = base | options
    assert unet_unconditional.tensor_shapes(raw) == built("UNet2DModel", raw)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers_per_block": 3, "latent_channels": 5, "in_channels": 1, "out_channels": 2},
        {"use_quant_conv": False},
        {"use_post_quant_conv": False},
        {"mid_block_add_attention": False},
        {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]},
        {"up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"]},
        {
            "block_out_channels": [4],
            "down_block_types": VAE["down_block_types"][:1],
            "up_block_types": ["UpDecoderBlock2D"],
        },
    ],
    ids=str,
)
def test_every_option_of_an_autoencoder_counts(options: dict[str, Any]) -> None:
    raw = VAE | options
    assert autoencoder_kl.tensor_shapes(raw) == built("AutoencoderKL", raw)


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_size_of_a_text_encoder_counts(kind: str) -> None:
    raw = raw_encoder(kind)
    activations: list[dict[str, Any]] = [{"feed_forward_proj": name} for name in ("relu", "gated-gelu")]
    activations += [
        {"feed_forward_proj": "relu", "is_gated_act": True},
        {"feed_forward_proj": "gated-gelu", "is_gated_act": False},
    ]
    for options in [{}] if kind.startswith("clip") else activations:
        expected = expected_of_encoder(kind, raw | options)
        found = shapes(encoder(kind, raw | options))
        assert text_encoders.as_published(found, expected, typed(kind), kind == "clip-projected") == expected


@pytest.mark.parametrize("kind", TABLES)
def test_every_option_of_diffusers_has_its_default_here(kind: str) -> None:
    table, network = TABLES[kind]
    parameters = inspect.signature(network.__init__).parameters
    defaults: dict[str, Any] = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    assert defaults.keys() == table.RULES.keys() | set(table.WITHOUT_EFFECT)
    assert not table.RULES.keys() & set(table.WITHOUT_EFFECT)
    for name, (default, accepts) in table.RULES.items():
        assert default == (list(defaults[name]) if isinstance(defaults[name], tuple) else defaults[name])
        assert accepts(default)


@pytest.mark.parametrize("kind", RULES)
def test_every_size_of_transformers_has_its_default_here(kind: str) -> None:
    config = ENCODERS[kind][1]()
    rules = {name: default for name, (default, _) in RULES[kind].items() if name != "is_gated_act"}
    assert rules == {name: getattr(config, name) for name in rules}
    assert set(text_encoders.OTHER_NAMES[typed(kind)["model_type"]]) == set(config.attribute_map)


@pytest.mark.parametrize(
    ("kind", "base", "options"),
    [
        (
            "UNet2DConditionModel",
            unet.SMALL,
            {
                "sample_size": 32,
                "center_input_sample": True,
                "flip_sin_to_cos": False,
                "freq_shift": 1,
                "downsample_padding": 0,
                "mid_block_scale_factor": 1.5,
                "dropout": 0.5,
                "act_fn": "gelu",
                "norm_eps": 1e-3,
                "addition_time_embed_dim": 4,
                "upcast_attention": True,
                "resnet_skip_time_act": True,
                "resnet_out_scale_factor": 2.0,
                "time_embedding_act_fn": "silu",
                "timestep_post_act": "silu",
                "mid_block_only_cross_attention": True,
                "cross_attention_norm": "layer_norm",
                "addition_embed_type_num_heads": 2,
            },
        ),
        (
            "UNet2DModel",
            unet.PLAIN,
            {
                "sample_size": 32,
                "center_input_sample": True,
                "freq_shift": 0,
                "flip_sin_to_cos": True,
                "mid_block_scale_factor": 1.5,
                "downsample_padding": 1,
                "dropout": 0.5,
                "act_fn": "gelu",
                "norm_num_groups": 2,
                "norm_eps": 1e-3,
                "num_train_timesteps": 10,
            },
        ),
        (
            "AutoencoderKL",
            VAE,
            {
                "act_fn": "gelu",
                "norm_num_groups": 4,
                "sample_size": 64,
                "scaling_factor": 2.0,
                "shift_factor": 0.5,
                "latents_mean": [0.0] * 4,
                "latents_std": [1.0] * 4,
                "force_upcast": False,
            },
        ),
    ],
)
def test_options_without_effect_change_no_tensor(kind: str, base: dict[str, Any], options: dict[str, Any]) -> None:
    table = TABLES[kind][0]
    assert set(table.WITHOUT_EFFECT) == options.keys()
    plain = built(kind, base)
    for name, value in options.items():
        assert built(kind, base | {name: value}) == plain, name
        assert table.tensor_shapes(base | {name: value, "_diffusers_version": "0.6.0"}) == plain, name


# ---------------------------------------------------------------- what the tables leave to the ranks


@pytest.mark.parametrize(
    ("kind", "base", "options"),
    [
        ("UNet2DConditionModel", unet.SMALL, {"option_of_tomorrow": 1}),
        ("UNet2DConditionModel", unet.SMALL, {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}),
        ("UNet2DConditionModel", unet.SMALL, {"down_block_types": ["AttnDownBlock2D"] * 3}),
        ("UNet2DConditionModel", unet.SMALL, {"class_embed_type": "timestep"}),
        ("UNet2DConditionModel", unet.SMALL, {"num_class_embeds": 4}),
        ("UNet2DConditionModel", unet.SMALL, {"attention_type": "gated"}),
        ("UNet2DConditionModel", unet.SMALL, {"transformer_layers_per_block": [1, [1, 2], 1]}),
        ("UNet2DModel", unet.PLAIN, {"down_block_types": ["ResnetDownsampleBlock2D"] * 3}),
        ("UNet2DModel", unet.PLAIN, {"time_embedding_type": "learned", "num_train_timesteps": 10}),
        ("AutoencoderKL", VAE, {"option_of_tomorrow": 1}),
    ],
    ids=str,
)
def test_an_option_that_no_table_knows_is_left_to_the_ranks(
    kind: str, base: dict[str, Any], options: dict[str, Any]
) -> None:
    assert TABLES[kind][0].tensor_shapes(base | options) is None
    assert TABLES[kind][0].tensor_shapes(base) is not None


def test_another_name_of_a_size_is_left_to_the_ranks() -> None:
    assert expected_of_encoder("t5", TINY_T5 | {"num_hidden_layers": 1}) is None
    assert text_encoders.tensor_shapes({"model_type": "gemma2"}) is None


def test_a_value_that_no_text_encoder_has_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^d_ff='wide' does not fit; give a whole number above 0$"):
        expected_of_encoder("t5", TINY_T5 | {"d_ff": "wide"})
    with pytest.raises(
        CheckpointError, match=r"^hidden_size=8 does not fit; give a multiple of num_attention_heads=3$"
    ):
        expected_of_encoder("clip", TINY_CLIP | {"num_attention_heads": 3})
    with pytest.raises(StrictDataclassClassValidationError, match="not a multiple"):  # as transformers does
        encoder("clip", TINY_CLIP | {"num_attention_heads": 3})


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        ("UNet2DConditionModel", unet.SMALL),
        ("UNet2DConditionModel", unet.SIZED),
        ("UNet2DModel", unet.NCSNPP),
        ("AutoencoderKL", VAE),
    ],
    ids=["small", "sized", "ncsnpp", "vae"],
)
def test_any_value_of_an_option_is_read_or_refused_or_left_to_the_ranks(kind: str, base: dict[str, Any]) -> None:
    table, left = TABLES[kind][0], 0
    values: list[Any] = [
        None,
        "x",
        -1,
        0,
        1.5,
        [],
        {},
        True,
        1,
        [1],
        [1, "a", 2],
        [0, 0, 0],
        [2, 3, 4, 5],
        float("nan"),
    ]
    for key, (_, accepts) in table.RULES.items():
        for value in values:
            if isinstance(accepts, Values) and not accepts(value):
                with pytest.raises(CheckpointError, match=rf"^{key}=.* does not fit; give {re.escape(accepts.words)}$"):
                    table.tensor_shapes(base | {key: value})
            else:
                left += table.tensor_shapes(base | {key: value}) is None
    assert left > 3 * len(table.RULES)


# ---------------------------------------------------------------- names that loaders accept


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def stored_variants(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of an encoder as files of different ages and sources have them, and damaged ones."""
    first = next(iter(tensors))
    shared, embedding = text_encoders.SHARED, text_encoders.EMBEDDING
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    found = {
        "plain": tensors,
        "bare": bare,
        "without the first": {name: t for name, t in tensors.items() if name != first},
        "misshapen": tensors | {first: torch.zeros(3, 5)},
        "stranger": tensors | {"stranger": torch.zeros(1)},
        "projection": tensors | {"text_projection.weight": torch.zeros(6, 8)},
        "vision": tensors | {"vision_model.post_layernorm.weight": torch.zeros(1)},
        "positions": tensors | {"text_model.embeddings.position_ids": torch.arange(7)[None]},
        "old positions": tensors | {"embeddings.position_ids": torch.arange(77)[None]},
        "decoder": tensors | {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(1)},
        "output": tensors | {"lm_head.weight": torch.zeros(20, 8)},
        "one embedding": {name: t for name, t in tensors.items() if name != embedding},
        "another embedding": {name: t for name, t in tensors.items() if name != shared},
        "no embedding": {name: t for name, t in tensors.items() if name not in (shared, embedding)},
        "two embeddings": tensors | {embedding: torch.zeros(20, 8)},
        "an embedding of another size": tensors | {embedding: torch.zeros(19, 8)},
        "positions of a layer": tensors
        | {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": torch.zeros(4, 2)},
    }
    for prefix in ("text_model.", "clip.", "clip.text_model.", "transformer.", "model.", "text_model.text_model."):
        found[f"prefix {prefix}"] = prefixed(prefix, bare)
    return found


def loads(kind: str, tensors: dict[str, torch.Tensor]) -> bool:
    """Return whether the loader accepts tensors, as models.text.load calls it."""
    make, config = ENCODERS[kind]
    try:
        _, found = make.from_pretrained(
            None, config=config(**raw_encoder(kind)), state_dict=dict(tensors), output_loading_info=True
        )
        check_loading_info(found, Path())
    except (CheckpointError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_text_encoders_names_pass_as_its_loader_accepts_them(kind: str) -> None:
    tensors = {n: t.clone() for n, t in encoder(kind, raw_encoder(kind), "cpu").state_dict().items()}
    accepted = 0
    for what, stored in stored_variants(kind, tensors).items():
        expected = expected_of_encoder(kind, raw_encoder(kind))
        sizes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        named = text_encoders.as_published(sizes, expected, typed(kind), kind == "clip-projected")
        accepted += (passes := loads(kind, stored))
        if passes:
            check_names_and_shapes(expected, named, what)
        else:
            with pytest.raises(CheckpointError):
                check_names_and_shapes(expected, named, what)
    assert 4 < accepted < 20


# ---------------------------------------------------------------- before ranks start


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    pipeline: StableDiffusionPipeline = unet.sd("sd15")
    pipeline.save_pretrained(folder)
    return folder


def compose(folder: Path, engine: str) -> None:
    compose_run(["model=sd15", f"model.path={folder}", f"engine={engine}"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", "diffusers"])
@pytest.mark.parametrize(
    ("component", "tensor"),
    [
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
        ("vae", "decoder.up_blocks.1.resnets.0.conv1.weight"),
        ("text_encoder", "text_model.encoder.layers.1.mlp.fc1.weight"),
    ],
)
def test_a_tensor_of_another_name_or_shape_is_refused_before_ranks_start(
    component: str, tensor: str, engine: str, checkpoint: Path
) -> None:
    compose(checkpoint, engine)
    file = next((checkpoint / component).glob("*.safetensors"))
    before = file.read_bytes()
    tensors = load_file(file)
    name = tensor if tensor in tensors else tensor.removeprefix("text_model.")
    shape = tuple(tensors[name].shape)
    kept = tensors.pop(name)
    try:
        save_file(tensors | {"stranger": kept}, file, metadata={"format": "pt"})
        with pytest.raises(ConfigError) as caught:
            compose(checkpoint, engine)
        line = str(caught.value)
        start = f"{file.parent} (sizes of {file.parent / 'config.json'}): the weights do not fit the network: "
        assert f"{start}missing {tensor}; unexpected stranger" in line
        assert "\n" not in line
        save_file(tensors | {name: torch.zeros(3)}, file, metadata={"format": "pt"})
        with pytest.raises(ConfigError) as caught:
            compose(checkpoint, engine)
        assert f"{start}{tensor} is (3,), the network has {shape}" in str(caught.value)
    finally:
        file.write_bytes(before)
    compose(checkpoint, engine)


def test_names_from_before_2023_pass_as_they_load(checkpoint: Path) -> None:
    file = checkpoint / "vae" / WEIGHTS
    before, tensors = file.read_bytes(), load_file(file)
    old = {LEGACY_NAMES.to_published(name): tensor for name, tensor in tensors.items()}
    assert "decoder.mid_block.attentions.0.query.weight" in old
    try:
        save_file(old, file, metadata={"format": "pt"})
        compose(checkpoint, "native")
    finally:
        file.write_bytes(before)


def test_another_engine_refuses_the_configuration_that_its_ranks_would(checkpoint: Path) -> None:
    path = checkpoint / "unet" / "config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | {"attention_type": "gated"}))
        with pytest.raises(ConfigError, match="attention_type=gated is not supported"):
            compose(checkpoint, "diffusers")
    finally:
        path.write_text(before)
