"""Low-rank updates are W + weight * (alpha / rank) * B A, by whatever names a trainer wrote.

The reference is a checkpoint whose weights were updated by hand, in diffusers' names.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, ModelMixin, UNet2DConditionModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from harness.client.generator import DiffusionGenerator
from models.checkpoint_source import CheckpointSource, LoraFile
from models.decoders import load_from_diffusers
from models.files import CheckpointError
from models.pixart import load_denoiser
from models.text.load import load_encoder
from tests.fixtures.models.lora import (
    EMOJI,
    KOHYA,
    PARAMETERS,
    PIXART,
    UNET,
    WEIGHTS,
    Made,
    kohya,
    layers_of,
    pixart_lora,
    tiny,
    unet_layers,
)
from tests.fixtures.models.parity import rel_l2

FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}
WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
}
CLIP = CLIPTextConfig(
    vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16
)


def save(network: ModelMixin, folder: Path, added: Mapping[str, Tensor] | None = None) -> Path:
    """Save a network's checkpoint with its weights updated by hand."""
    network.save_pretrained(folder)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    for name, update in (added or {}).items():
        tensors[name] = tensors[name] + update
    save_file(tensors, file)
    return folder


def save_clip(
    encoder: CLIPTextModel, folder: Path, added: Mapping[str, Tensor] | None = None, flat: bool = False
) -> None:
    """Save a text encoder's checkpoint as CLIP's are published, or `flat` without the prefix of their names.

    The denoiser beside it is one number.
    """
    encoder.save_pretrained(folder / "text_encoder")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    for name, update in (added or {}).items():
        tensors[name] = tensors[name] + update
    save_file({name.removeprefix("text_model.") if flat else name: t for name, t in tensors.items()}, file)
    (folder / "unet").mkdir(exist_ok=True)
    if not (folder / "unet" / WEIGHTS).exists():
        save_file({"one": torch.ones(1)}, folder / "unet" / WEIGHTS)


def apart(ours: nn.Module, theirs: nn.Module) -> float:
    """Return the largest relative difference between parameters of one name."""
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == other.keys()
    return max(rel_l2(mine[name].detach().float(), other[name].detach().float()) for name in mine)


def moved(added: Mapping[str, Tensor], network: nn.Module) -> bool:
    """Return whether every update is a sizeable part of its target, so that a missing one is seen."""
    return all(float(update.norm()) > 0.05 for update in added.values()) and len(added) > 0


# ---------------------------------------------------------------- a native network, in diffusers' and PEFT's names


@pytest.fixture
def by_hand(tmp_path: Path) -> Callable[[Mapping[str, Tensor]], CheckpointSource]:
    """Return the shipped checkpoint with its denoiser updated by hand."""

    def make(added: Mapping[str, Tensor]) -> CheckpointSource:
        folder = Path(shutil.copytree(EMOJI, tmp_path / "by_hand"))
        tensors = {name: t + added[name] if name in added else t for name, t in PARAMETERS.items()}
        save_file(tensors, folder / "transformer" / WEIGHTS)
        return CheckpointSource(folder)

    return make


@pytest.mark.parametrize(
    ("spell", "ends", "alphas"),
    [
        (lambda layer: f"transformer.{layer}", (".lora_A.weight", ".lora_B.weight"), False),
        (lambda layer: f"transformer.{layer}", (".lora.down.weight", ".lora.up.weight"), False),
        (lambda layer: layer, (".lora_A.default.weight", ".lora_B.default.weight"), False),
        (lambda layer: f"base_model.model.{layer}", (".lora_A.weight", ".lora_B.weight"), False),
        (lambda layer: f"diffusion_model.{layer}", KOHYA, True),
        (lambda layer: kohya("lora_unet_", layer), KOHYA, True),
        (lambda layer: kohya("lora_transformer_", layer), KOHYA, True),
    ],
    ids=["diffusers", "diffusers-old", "peft-bare", "peft", "dotted", "kohya", "kohya-transformer"],
)
def test_every_spelling_is_one_update(
    spell: Callable[[str], str],
    ends: tuple[str, str],
    alphas: bool,
    by_hand: Callable[[Mapping[str, Tensor]], CheckpointSource],
    tmp_path: Path,
) -> None:
    made = pixart_lora(spell, ends, alphas)
    source = CheckpointSource(EMOJI, loras=(made.save(tmp_path / "a.safetensors"),))
    ours, theirs = load_denoiser(source), load_denoiser(by_hand(made.added))
    assert moved(made.added, theirs)
    assert apart(ours, theirs) < 1e-6
    assert source.loaded["transformer"].merged == len(PIXART)
    assert apart(ours, load_denoiser(CheckpointSource(EMOJI))) > 0.1


def test_several_add_up_each_with_its_weight(
    by_hand: Callable[[Mapping[str, Tensor]], CheckpointSource], tmp_path: Path
) -> None:
    first = pixart_lora(lambda layer: f"transformer.{layer}", (".lora_A.weight", ".lora_B.weight"), False)
    second = pixart_lora(lambda layer: kohya("lora_unet_", layer), KOHYA, True, seed=50)
    loras = (
        LoraFile(first.save(tmp_path / "a.safetensors").path, 0.7),
        LoraFile(second.save(tmp_path / "b.safetensors").path, -1.5),
    )
    together = {name: 0.7 * update - 1.5 * second.added[name] for name, update in first.added.items()}
    assert apart(load_denoiser(CheckpointSource(EMOJI, loras=loras)), load_denoiser(by_hand(together))) < 1e-6


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    """bfloat16 weights are those of the float32 sum, not of a rounded weight plus a rounded update."""
    made = pixart_lora(lambda layer: f"transformer.{layer}", (".lora_A.weight", ".lora_B.weight"), False)
    loras = (LoraFile(made.save(tmp_path / "a.safetensors").path, 0.01),) * 3
    exact = load_denoiser(CheckpointSource(EMOJI, loras=loras))
    rounded = load_denoiser(CheckpointSource(EMOJI, loras=loras, dtype=torch.bfloat16))
    for ours, theirs in zip(rounded.parameters(), exact.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"lora_alpha": 6}, lambda rank, name: 6 / rank),
        ({"lora_alpha": 6, "use_rslora": True}, lambda rank, name: 6 / math.sqrt(rank)),
        (
            {"lora_alpha": 6, "alpha_pattern": {"ff.net.2": 2.0}},
            lambda rank, name: (2 if name.endswith(".2") else 6) / rank,
        ),
        ({"r": 4}, lambda rank, name: 1.0),
    ],
    ids=["alpha", "rslora", "pattern", "none"],
)
@pytest.mark.parametrize("where", ["metadata", "beside"])
def test_what_peft_says_of_the_scale_counts(
    where: str,
    options: dict[str, object],
    scale: Callable[[int, str], float],
    by_hand: Callable[[Mapping[str, Tensor]], CheckpointSource],
    tmp_path: Path,
) -> None:
    made, path = Made(), tmp_path / "lora" / "adapter_model.safetensors"
    prefix = "transformer." if where == "metadata" else "base_model.model."
    for layer, (rank, _) in PIXART.items():
        shape = tuple(PARAMETERS[f"{layer}.weight"].shape)
        made.layer(f"{layer}.weight", shape, prefix + layer, rank, scale=scale(rank, layer))
    if where == "metadata":
        said = {f"transformer.{name}": value for name, value in options.items()}
        lora = made.save(path, {"lora_adapter_metadata": json.dumps(said), "format": "pt"})
    else:
        lora = made.save(path)
        (path.parent / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **options}))
    assert apart(load_denoiser(CheckpointSource(EMOJI, loras=(lora,))), load_denoiser(by_hand(made.added))) < 1e-6


def test_an_image_is_that_of_the_updated_weights(
    by_hand: Callable[[Mapping[str, Tensor]], CheckpointSource], tmp_path: Path
) -> None:
    """From the command line to pixels, with the denoiser and the text encoder updated from one file."""
    made = pixart_lora(lambda layer: f"transformer.{layer}", (".lora_A.weight", ".lora_B.weight"), False)
    stored = load_file(EMOJI / "text_encoder" / "model.safetensors")
    name = "encoder.block.0.layer.0.SelfAttention.v.weight"
    encoder = Made(seed=90)
    encoder.layer(name, tuple(stored[name].shape), f"text_encoder.{name.removesuffix('.weight')}", alpha=2.0)
    made.tensors |= encoder.tensors
    file = made.save(tmp_path / "a.safetensors").path
    source = by_hand({key: 0.5 * update for key, update in made.added.items()})
    stored[name] = stored[name] + 0.5 * encoder.added[name]
    save_file(stored, source.folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})

    def generate(*overrides: str) -> tuple[Tensor, list[int]]:
        plain = ("launch.mode=inprocess", "launch.threads_per_rank=1", "request.steps=4", "request.seed=3")
        with DiffusionGenerator.from_config(*plain, "request.prompt=rocket", *overrides) as generator:
            generated = generator.generate()
            merged = {row.component: row.merged for row in generated.record.loaded}
        return torch.from_numpy(generated.pixels[0].copy()), [merged[k] for k in ("transformer", "text_encoder", "vae")]

    ours, merged = generate(f"model.lora=[{{path: {file}, weight: 0.5}}]")
    theirs, none = generate(f"model.path={source.folder}")
    assert merged == [len(PIXART), 1, 0]
    assert none == [0, 0, 0]
    assert float((ours - theirs).abs().max()) < 1e-4
    for other in ([], [f"model.lora=[{{path: {file}}}]"]):
        assert float((ours - generate(*other)[0]).abs().max()) > 0.05


# ---------------------------------------------------------------- UNets


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return tiny(UNet2DConditionModel, UNET)


def reloaded(kind: type[ModelMixin], component: str, base: Path, loras: tuple[LoraFile, ...] = ()) -> ModelMixin:
    return load_from_diffusers(CheckpointSource(base, component, loras=loras), component, kind)


@pytest.mark.parametrize("style", ["kohya", "peft", "processor"])
def test_a_unet_is_updated_convolutions_too(style: str, unet: UNet2DConditionModel, tmp_path: Path) -> None:
    made = Made()
    for number, (name, shape) in enumerate(unet_layers(unet)):
        if style == "kohya":
            made.layer(f"{name}.weight", shape, kohya("lora_unet_", name), 2 + number % 3, 1.0 + number % 2, KOHYA)
        elif style == "peft" or "attn" not in name:
            made.layer(f"{name}.weight", shape, f"unet.{name}")
        else:  # diffusers' files from before it used PEFT
            parent, _, last = name.replace("to_out.0", "to_out").rpartition(".")
            ends = (f".{last}_lora.down.weight", f".{last}_lora.up.weight")
            if last in ("to_q", "to_out"):
                made.layer(f"{name}.weight", shape, f"unet.{parent}.processor", ends=ends)
    save(unet, tmp_path / "base" / "unet")
    save(unet, tmp_path / "hand" / "unet", made.added)
    ours = reloaded(UNet2DConditionModel, "unet", tmp_path / "base", (made.save(tmp_path / "a.safetensors"),))
    theirs = reloaded(UNet2DConditionModel, "unet", tmp_path / "hand")
    assert {len(update.shape) for update in made.added.values()} == {2, 4}
    assert moved(made.added, theirs)
    assert apart(ours, theirs) < 1e-6
    latent, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    with torch.no_grad():
        generated = [net(latent, torch.tensor(7), text).sample for net in (ours, theirs, unet)]
    assert rel_l2(generated[0], generated[1]) < 1e-5
    assert rel_l2(generated[0], generated[2]) > 0.1


def test_a_linear_stored_as_a_1x1_kernel_is_the_same(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    name, shape = next((n, s) for n, s in layers_of(unet) if n.endswith("proj_in"))
    made = Made()
    made.layer(f"{name}.weight", shape, f"unet.{name}")
    save(unet, tmp_path / "base" / "unet")
    save(unet, tmp_path / "hand" / "unet", made.added)
    made.tensors = {key: tensor.flatten(1) for key, tensor in made.tensors.items()}
    lora = made.save(tmp_path / "a.safetensors")
    ours = reloaded(UNet2DConditionModel, "unet", tmp_path / "base", (lora,))
    assert apart(ours, reloaded(UNet2DConditionModel, "unet", tmp_path / "hand")) < 1e-6


SGM = {  # the first publisher's names of SDXL's layers, and diffusers'
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_out_layers_3": "down_blocks.0.resnets.1.conv2",
    "input_blocks_2_0_emb_layers_1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_5_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q",
    "input_blocks_8_1_transformer_blocks_0_attn2_to_out_0": (
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0"
    ),
    "middle_block_1_transformer_blocks_0_ff_net_0_proj": ("mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"),
    "output_blocks_0_1_transformer_blocks_0_attn1_to_v": "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v",
    "output_blocks_5_1_transformer_blocks_0_ff_net_2": "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2",
}


def test_sdxl_in_its_first_publishers_names(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    """A text encoder of kohya is in the same file, and each layer has its own alpha."""
    shapes, made, encoder = dict(layers_of(unet)), Made(), CLIPTextModel(CLIP)
    for number, (theirs, ours) in enumerate(SGM.items()):
        made.layer(f"{ours}.weight", shapes[ours], f"lora_unet_{theirs}", 2 + number % 3, 0.5 + number, KOHYA)
    part = "text_model.encoder.layers.1.self_attn.out_proj"
    text = Made(seed=70)
    text.layer(f"{part}.weight", (16, 16), kohya("lora_te1_", part), 2, 3.0, KOHYA)
    added, text_added = dict(made.added), dict(text.added)
    made.tensors |= text.tensors
    lora = made.save(tmp_path / "a.safetensors")
    for folder, change, change_text in (("base", None, None), ("hand", added, text_added)):
        save(unet, tmp_path / folder / "unet", change)
        save_clip(encoder, tmp_path / folder, change_text)
    ours = reloaded(UNet2DConditionModel, "unet", tmp_path / "base", (lora,))
    assert apart(ours, reloaded(UNet2DConditionModel, "unet", tmp_path / "hand")) < 1e-6
    source = CheckpointSource(tmp_path / "base", "unet", loras=(lora,))
    mine = load_encoder(source, "text_encoder", CLIPTextModel, CLIPTextConfig)
    hand = load_encoder(CheckpointSource(tmp_path / "hand", "unet"), "text_encoder", CLIPTextModel, CLIPTextConfig)
    assert apart(mine, hand) < 1e-6
    assert apart(mine, encoder) > 0.05
    assert source.loaded["text_encoder"].merged == 1


# ---------------------------------------------------------------- text encoders


def encoders(made: Made, tmp_path: Path, flat: bool = False, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """Return a text encoder with a file's updates, one with the same by hand, and one with none."""
    torch.manual_seed(0)
    encoder = CLIPTextModel(CLIP)
    save_clip(encoder, tmp_path / "base", flat=flat)
    save_clip(encoder, tmp_path / "hand", made.added, flat)
    lora = made.save(tmp_path / "a.safetensors")
    base, hand = (
        CheckpointSource(tmp_path / "base", "unet", dtype=dtype),
        CheckpointSource(tmp_path / "hand", "unet", dtype=dtype),
    )
    sources = (replace(base, loras=(lora,)), hand, base)
    return [load_encoder(source, "text_encoder", CLIPTextModel, CLIPTextConfig) for source in sources]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flat", [False, True], ids=["published", "flat"])
@pytest.mark.parametrize(
    "spell",
    [
        lambda layer: f"text_encoder.{layer}",
        lambda layer: f"text_encoder.{layer.removeprefix('text_model.')}",
        lambda layer: kohya("lora_te_", layer),
        lambda layer: kohya("lora_te_", layer.removeprefix("text_model.")),
    ],
    ids=["dotted", "dotted-flat", "kohya", "kohya-flat"],
)
def test_a_text_encoder_is_updated(spell: Callable[[str], str], flat: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    made = Made()
    for part, shape in (("mlp.fc1", (32, 16)), ("self_attn.q_proj", (16, 16)), ("mlp.fc2", (16, 32))):
        layer = f"text_model.encoder.layers.0.{part}"
        made.layer(f"{layer}.weight", shape, spell(layer), 2, 1.5, KOHYA)
    ours, hand, plain = encoders(made, tmp_path, flat, dtype)
    assert apart(ours, hand) < (1e-6 if dtype is torch.float32 else 2e-3)  # a float32 sum may round up or down
    assert apart(ours, plain) > 0.05
    assert {p.dtype for p in ours.parameters()} == {dtype}


def test_before_peft_diffusers_named_attention_otherwise(tmp_path: Path) -> None:
    made = Made()
    for old, new in (("to_q", "q_proj"), ("to_out", "out_proj")):
        layer = "text_model.encoder.layers.0.self_attn"
        ends = (f".{old}_lora.down.weight", f".{old}_lora.up.weight")
        made.layer(f"{layer}.{new}.weight", (16, 16), f"text_encoder.{layer}", ends=ends)
    layer = "text_model.encoder.layers.1.mlp.fc1"
    ends = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
    made.layer(f"{layer}.weight", (32, 16), f"text_encoder.{layer}", ends=ends)
    ours, hand, plain = encoders(made, tmp_path)
    assert apart(ours, hand) < 1e-6
    assert apart(ours, plain) > 0.05


# ---------------------------------------------------------------- other publishers' names


def flux_lora(made: Made, prefix: str, rank: int = 4, alpha: float = 3.0) -> None:
    """kohya's FLUX names: q, k and v in one layer."""
    for stream, parts in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
        whole = Made(seed=made.seed + 1)
        whole.layer("qkv", (96, 32), f"{prefix}double_blocks_0_{stream}_attn_qkv", rank, alpha, KOHYA)
        made.seed = whole.seed
        made.tensors |= whole.tensors
        for part, update in zip(parts, whole.added["qkv"].chunk(3), strict=True):
            made.added[f"transformer_blocks.0.attn.{part}.weight"] = update
    for theirs, ours, shape in (
        ("double_blocks_0_img_attn_proj", "transformer_blocks.0.attn.to_out.0", (32, 32)),
        ("double_blocks_0_txt_attn_proj", "transformer_blocks.0.attn.to_add_out", (32, 32)),
        ("double_blocks_0_img_mlp_0", "transformer_blocks.0.ff.net.0.proj", (128, 32)),
        ("double_blocks_0_txt_mlp_2", "transformer_blocks.0.ff_context.net.2", (32, 128)),
        ("double_blocks_0_img_mod_lin", "transformer_blocks.0.norm1.linear", (192, 32)),
        ("single_blocks_0_linear2", "single_transformer_blocks.0.proj_out", (32, 160)),
        ("single_blocks_0_modulation_lin", "single_transformer_blocks.0.norm.linear", (96, 32)),
    ):
        made.layer(f"{ours}.weight", shape, prefix + theirs, rank, alpha, KOHYA)


def test_flux_in_kohyas_names(tmp_path: Path) -> None:
    network, made = tiny(FluxTransformer2DModel, FLUX), Made()
    flux_lora(made, "lora_unet_")
    save(network, tmp_path / "base" / "transformer")
    save(network, tmp_path / "hand" / "transformer", made.added)
    ours = reloaded(FluxTransformer2DModel, "transformer", tmp_path / "base", (made.save(tmp_path / "a.safetensors"),))
    assert moved(made.added, network)
    assert apart(ours, reloaded(FluxTransformer2DModel, "transformer", tmp_path / "hand")) < 1e-6


def test_flux_in_diffusers_names_with_underscores(tmp_path: Path) -> None:
    network, made = tiny(FluxTransformer2DModel, FLUX), Made()
    for name, shape in layers_of(network):
        made.layer(f"{name}.weight", shape, kohya("lora_transformer_", name), 2, 1.0, KOHYA)
    save(network, tmp_path / "base" / "transformer")
    save(network, tmp_path / "hand" / "transformer", made.added)
    ours = reloaded(FluxTransformer2DModel, "transformer", tmp_path / "base", (made.save(tmp_path / "a.safetensors"),))
    assert apart(ours, reloaded(FluxTransformer2DModel, "transformer", tmp_path / "hand")) < 1e-6


def test_wan_in_its_publishers_names(tmp_path: Path) -> None:
    network, made = tiny(WanTransformer3DModel, WAN), Made()
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        for part, there in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")):
            made.layer(f"blocks.0.{ours}.{part}.weight", (24, 24), f"diffusion_model.blocks.0.{theirs}.{there}")
    for part, there, shape in (("net.0.proj", "0", (32, 24)), ("net.2", "2", (24, 32))):
        made.layer(f"blocks.0.ffn.{part}.weight", shape, f"diffusion_model.blocks.0.ffn.{there}")
    save(network, tmp_path / "base" / "transformer")
    save(network, tmp_path / "hand" / "transformer", made.added)
    ours = reloaded(WanTransformer3DModel, "transformer", tmp_path / "base", (made.save(tmp_path / "a.safetensors"),))
    assert apart(ours, reloaded(WanTransformer3DModel, "transformer", tmp_path / "hand")) < 1e-6


@pytest.mark.parametrize(
    "stray",
    [
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
        "lora_te1_text_projection",
        "lora_unet_triple_blocks_0_linear",
    ],
)
def test_a_layer_that_is_nowhere_is_named_alone(stray: str, tmp_path: Path) -> None:
    """diffusers' conversion drops the update of a T5 or a projection, with one line in a log."""
    network, made = tiny(FluxTransformer2DModel, FLUX), Made()
    flux_lora(made, "lora_unet_")
    made.layer("-", (16, 16), stray, ends=KOHYA, alpha=3.0)
    save(network, tmp_path / "transformer")
    with pytest.raises(CheckpointError, match=f"1 of its 10 layers are not in transformer: {stray}; remove") as caught:
        reloaded(FluxTransformer2DModel, "transformer", tmp_path, (made.save(tmp_path / "a.safetensors"),))
    assert "\n" not in str(caught.value)
