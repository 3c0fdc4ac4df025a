"""Low-rank updates that do not fit, or are of another kind, are refused in one line, before a process starts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.resolve.compose import ConfigError, compose_run
from models.checkpoint_source import CheckpointSource
from models.files import CheckpointError
from models.lora import lora_updates
from tests.fixtures.models.lora import EMOJI, KOHYA, PARAMETERS, Made, kohya, pixart_lora


def refused(path: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_run([f"model.lora=[{{path: {path}}}]"])
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    return line


def test_layers_that_match_nothing_are_listed(tmp_path: Path) -> None:
    made = pixart_lora(lambda layer: f"transformer.{layer}", (".lora_A.weight", ".lora_B.weight"), False)
    for n in range(8):
        made.layer("-", (16, 16), f"transformer.layers.{n}.to_q")
    line = refused(made.save(tmp_path / "a.safetensors").path)
    assert "8 of its 16 layers are not in transformer, text_encoder: transformer.layers.0.to_q, transformer.lay" in line
    assert "and 2 more; remove them from the file, or give a model that has them" in line


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("diffusion_model.double_blocks.0.img_attn.qkv", "FLUX"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "Stable Diffusion 3"),
        ("lora_unet_input_blocks_4_1_proj_in", "Stable Diffusion 1, 2 or XL"),
        ("blocks.0.self_attn.q", "Wan"),
        ("diffusion_model.layers.0.attention.qkv", "Z-Image"),
        ("transformer.transformer_blocks.0.img_mlp.net.2", "Qwen-Image"),
    ],
)
def test_a_lora_of_another_family_is_called_by_its_name(name: str, family: str, tmp_path: Path) -> None:
    made = Made()
    made.layer("-", (16, 16), name)
    line = refused(made.save(tmp_path / "a.safetensors").path)
    assert f"none of its 1 layers is in transformer, text_encoder: {name}; these are names of {family}:" in line


@pytest.mark.parametrize("name", ["text_encoder_2.encoder.layers.0.mlp.fc1", "lora_te3_encoder", "vae.decoder.conv_in"])
def test_a_component_that_is_not_there_is_refused(name: str, tmp_path: Path) -> None:
    made = Made()
    made.layer("-", (16, 16), name)
    line = refused(made.save(tmp_path / "a.safetensors").path)
    assert line.endswith(f"none of its 1 layers is in transformer, text_encoder: {name}")


def test_shapes_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    made, width = Made(), PARAMETERS["transformer_blocks.0.attn1.to_q.weight"].shape[0]
    made.layer("-", (width, width + 1), "transformer.transformer_blocks.0.attn1.to_q")
    made.layer("-", (width - 1, width), "transformer.transformer_blocks.0.attn1.to_k")
    made.layer("-", (width, width), "transformer.transformer_blocks.0.attn1.to_v")
    ranks = "transformer.transformer_blocks.1.attn1.to_v"
    made.tensors |= {f"{ranks}.lora_A.weight": torch.zeros(3, width), f"{ranks}.lora_B.weight": torch.zeros(width, 2)}
    line = refused(made.save(tmp_path / "a.safetensors").path)
    assert f"transformer_blocks.0.attn1.to_q.weight is ({width}, {width}), its update ({width}, 3) times" in line
    assert "attn1.to_k.weight" in line
    assert "blocks.1.attn1.to_v.weight" in line
    assert "blocks.0.attn1.to_v.weight" not in line


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("transformer.proj_out.lora_magnitude_vector", "DoRA"),
        ("lora_unet_proj_out.dora_scale", "DoRA"),
        ("lora_unet_proj_out.lokr_w1", "LoKr"),
        ("lora_unet_proj_out.hada_w1_a", "LoHa"),
        ("lora_unet_proj_out.oft_blocks", "OFT"),
        ("lora_unet_proj_out.lora_mid.weight", "LoCon with a middle matrix"),
        ("transformer.proj_out.lora_B.bias", "LoRA with a bias"),
        ("diffusion_model.proj_out.weight", "not a tensor of a LoRA"),
        ("transformer.proj_out.lora_embedding_A", "LoRA of an embedding"),
    ],
)
def test_other_kinds_of_update_are_refused(key: str, kind: str, tmp_path: Path) -> None:
    made = Made()
    made.layer("-", (16, 16), "transformer.proj_out")
    made.tensors[key] = torch.zeros(16)
    assert f"{key} is {kind}; only LoRA can be merged" in refused(made.save(tmp_path / "a.safetensors").path)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa_niter_4"}])
def test_peft_options_that_change_the_sum_are_refused(options: dict[str, object], tmp_path: Path) -> None:
    made = pixart_lora(lambda layer: f"transformer.{layer}", (".lora_A.weight", ".lora_B.weight"), False)
    said = json.dumps({f"transformer.{name}": value for name, value in options.items()})
    lora = made.save(tmp_path / "a.safetensors", {"lora_adapter_metadata": said})
    with pytest.raises(CheckpointError, match="only plain LoRA can be merged"):
        lora_updates(CheckpointSource(EMOJI, loras=(lora,)), "transformer")


def test_half_a_layer_and_a_layer_twice_are_refused(tmp_path: Path) -> None:
    made = Made()
    made.layer("-", (16, 16), "transformer.proj_out")
    made.tensors["transformer.caption_projection.linear_1.lora_A.weight"] = torch.zeros(2, 16)
    line = refused(made.save(tmp_path / "a.safetensors").path)
    assert "one of the two matrices of transformer.caption_projection.linear_1 is missing" in line
    made = Made()
    made.layer("-", (16, 16), "transformer.proj_out")
    made.layer("-", (16, 16), "transformer.proj_out", ends=KOHYA)
    assert "transformer.proj_out has two updates" in refused(made.save(tmp_path / "a.safetensors").path)
    made = pixart_lora(lambda layer: f"transformer.{layer}", (".lora_A.weight", ".lora_B.weight"), False)
    made.tensors |= pixart_lora(lambda layer: kohya("lora_unet_", layer), KOHYA, False).tensors
    assert "weight has two updates, lora_unet_" in refused(made.save(tmp_path / "a.safetensors").path)


def test_files_that_are_no_lora_are_refused(tmp_path: Path) -> None:
    assert "no such folder or file" in refused("/no/such/lora.safetensors")
    assert "a folder; give its safetensors file" in refused(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"\x80\x04\x95" + b"p" * 500)
    assert "safetensors file" in refused(tmp_path / "a.bin")
    save_file({}, tmp_path / "none.safetensors")
    assert "it holds no tensor" in refused(tmp_path / "none.safetensors")
    save_file({"a.lora_A.weight": torch.zeros(2, 2, dtype=torch.int8)}, tmp_path / "int.safetensors")
    assert "quantised weights are not read here" in refused(tmp_path / "int.safetensors")


def test_random_weights_say_that_a_lora_has_no_effect(tmp_path: Path) -> None:
    notes = compose_run(["model.load=dummy", "model.lora=[{path: /no/such.safetensors}]"]).notes
    assert notes == ["model.lora has no effect on random weights (model.load=dummy)"]


def test_an_update_is_read_and_checked_once_for_all_its_components(tmp_path: Path) -> None:
    """A VAE takes no update, whatever the file contains."""
    made = pixart_lora(lambda layer: f"transformer.{layer}", (".lora_A.weight", ".lora_B.weight"), False)
    source = CheckpointSource(EMOJI, loras=(made.save(tmp_path / "a.safetensors"),))
    assert lora_updates(source, "vae") == {}
    assert lora_updates(source, "text_encoder") == {}
    assert lora_updates(source, "transformer").keys() == made.added.keys()
