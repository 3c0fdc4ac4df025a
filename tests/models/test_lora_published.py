"""LoRA files in the layouts that people publish: each adds its hand-computed update, in all names of its layers.

The files in lora_files/ have the names and the layout of published ones, with random numbers at the sizes of the tiny
checkpoints in the fixtures. The oracle of the table of names is diffusers' conversion of whole checkpoints.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from diffusers.loaders import single_file_utils
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin, WanLoraLoaderMixin
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint_source import CheckpointSource, LoraFile
from models.files import CheckpointError, list_tensors
from models.lora import lora_updates, merge_updates
from models.publisher_names import publisher_layers
from tests.fixtures.models.lora import KOHYA, UNET, Made, tiny

DATA = Path(__file__).parent / "lora_files"
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 40,
    "num_layers": 2,
}
FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 6, 6),
}
Z_IMAGE = {
    "in_channels": 4,
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 32,
    "axes_dims": [4, 6, 6],
    "axes_lens": [256, 64, 64],
}
SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 20,
    "out_channels": 4,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
NETWORKS = {
    "wan": (WanTransformer3DModel, WAN),
    "flux": (FluxTransformer2DModel, FLUX),
    "z_image": (ZImageTransformer2DModel, Z_IMAGE),
    "sd3": (SD3Transformer2DModel, SD3),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save one tiny denoiser of each family."""
    found = {}
    for name, (kind, config) in NETWORKS.items():
        found[name] = tmp_path_factory.mktemp(name)
        tiny(kind, config).save_pretrained(found[name] / "transformer")
    return found


def added(folder: Path, file: Path, weight: float = 1.0) -> dict[str, Tensor]:
    """Return what a file adds to each stored tensor, by published name."""
    source = CheckpointSource(folder, loras=(LoraFile(file, weight),))
    stored = list_tensors(source.weights("transformer"))
    updates = lora_updates(source, "transformer")
    return {
        name: merge_updates(stored[name], found) - merge_updates(stored[name], ()) for name, found in updates.items()
    }


def agree(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Assert that two updates are of the same tensors, and equal within 1e-5 of their size."""
    assert ours.keys() == theirs.keys()
    for name, update in theirs.items():
        assert float(update.norm()) > 1e-3, name
        assert float((ours[name] - update).norm() / update.norm()) < 1e-5, name


def product(file: Mapping[str, Tensor], layer: str, ends: tuple[str, str] = KOHYA) -> Tensor:
    """Return a layer's update alpha / rank * B A, from the tensors of a file."""
    down, up = file[layer + ends[0]], file[layer + ends[1]]
    alpha = file.get(f"{layer}.alpha")
    return (1.0 if alpha is None else float(alpha) / len(down)) * up @ down


PEFT = (".lora_A.weight", ".lora_B.weight")
WAN_LAYERS = {
    **{
        f"{own}.{part}": f"{theirs}.{layer}"
        for own, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, layer in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def test_wan_with_whole_differences_of_biases(folders: dict[str, Path]) -> None:
    path = DATA / "wan_lightx2v_diff_b.safetensors"
    file, expected = load_file(path), dict[str, Tensor]()
    for block in range(2):
        for own, layer in WAN_LAYERS.items():
            name = f"diffusion_model.blocks.{block}.{own}"
            expected[f"blocks.{block}.{layer}.weight"] = 0.5 * product(file, name)
            expected[f"blocks.{block}.{layer}.bias"] = 0.5 * file[f"{name}.diff_b"]
    agree(added(folders["wan"], path, 0.5), expected)


def test_wan_in_its_own_names_without_a_prefix(folders: dict[str, Path]) -> None:
    path = DATA / "wan_noprefix.safetensors"
    file = load_file(path)
    expected = {
        f"blocks.{block}.{layer}.weight": product(file, f"blocks.{block}.{own}", PEFT)
        for block in range(2)
        for own, layer in WAN_LAYERS.items()
    }
    agree(added(folders["wan"], path), expected)


def test_wan_with_whole_differences_of_norms_and_modulations(folders: dict[str, Path], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    differences = {
        "blocks.0.self_attn.norm_q.diff": ("blocks.0.attn1.norm_q.weight", (24,)),
        "blocks.1.norm3.diff": ("blocks.1.norm2.weight", (24,)),
        "blocks.1.norm3.diff_b": ("blocks.1.norm2.bias", (24,)),
        "blocks.0.diff_m": ("blocks.0.scale_shift_table", (1, 6, 24)),
        "patch_embedding.diff": ("patch_embedding.weight", (24, 4, 1, 2, 2)),
        "head.head.diff": ("proj_out.weight", (16, 24)),
    }
    file = {key: torch.randn(shape, generator=generator) for key, (_, shape) in differences.items()}
    save_file({f"diffusion_model.{key}": tensor for key, tensor in file.items()}, tmp_path / "a.safetensors")
    expected = {name: 2.0 * file[key] for key, (name, _) in differences.items()}
    agree(added(folders["wan"], tmp_path / "a.safetensors", 2.0), expected)


def test_z_images_fused_attention(folders: dict[str, Path]) -> None:
    path = DATA / "z_qkv.safetensors"
    parts = product(load_file(path), "diffusion_model.layers.0.attention.qkv", PEFT).chunk(3)
    expected = {f"layers.0.attention.to_{name}.weight": part for name, part in zip("qkv", parts, strict=True)}
    agree(added(folders["z_image"], path), expected)


@pytest.mark.parametrize("spell", ["layers.1.attention.out", "lora_unet_layers_1_attention_out"])
def test_z_images_output_of_attention(spell: str, folders: dict[str, Path], tmp_path: Path) -> None:
    made = Made()
    made.layer("layers.1.attention.to_out.0.weight", (48, 48), spell, alpha=2.0, ends=KOHYA)
    agree(added(folders["z_image"], made.save(tmp_path / "a.safetensors").path), made.added)


def test_flux_by_xlabs_as_diffusers_converts_it(folders: dict[str, Path]) -> None:
    path = DATA / "flux_xlabs.safetensors"
    file, expected = load_file(path), dict[str, Tensor]()
    for block in range(2):
        for number, names in ((1, ("to_q", "to_k", "to_v")), (2, ("add_q_proj", "add_k_proj", "add_v_proj"))):
            layer = f"double_blocks.{block}.processor.qkv_lora{number}"
            parts = product(file, layer, (".down.weight", ".up.weight")).chunk(3)
            for name, part in zip(names, parts, strict=True):
                expected[f"transformer_blocks.{block}.attn.{name}.weight"] = part
    agree(added(folders["flux"], path), expected)
    agree(expected, converted(FluxLoraLoaderMixin.lora_state_dict(file)))


def converted(file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a file adds in diffusers' names, alpha included."""
    layers = [key.removesuffix(PEFT[0]) for key in file if key.endswith(PEFT[0])]
    return {f"{layer.removeprefix('transformer.')}.weight": product(file, layer, PEFT) for layer in layers}


def test_flux_by_xlabs_in_its_single_blocks(folders: dict[str, Path], tmp_path: Path) -> None:
    ends, layer = ("_lora.down.weight", "_lora.up.weight"), "single_blocks.1.processor."
    made, fused = Made(), Made(seed=9)
    made.layer("single_transformer_blocks.1.proj_out.weight", (32, 160), f"{layer}proj", ends=ends)
    made.layer("double", (32, 32), "double_blocks.0.processor.proj", ends=("_lora2.down.weight", "_lora2.up.weight"))
    fused.layer("qkv", (96, 32), f"{layer}qkv", ends=ends)
    made.added["transformer_blocks.0.attn.to_add_out.weight"] = made.added.pop("double")
    for name, part in zip("qkv", fused.added["qkv"].chunk(3), strict=True):
        made.added[f"single_transformer_blocks.1.attn.to_{name}.weight"] = part
    made.tensors |= fused.tensors
    agree(added(folders["flux"], made.save(tmp_path / "a.safetensors").path), made.added)


def test_flux_by_kohya_with_its_final_layer(folders: dict[str, Path]) -> None:
    path = DATA / "flux_kohya_final_alpha.safetensors"
    file = load_file(path)
    assert float(file["lora_unet_final_layer_linear.alpha"]) != len(
        file["lora_unet_final_layer_linear.lora_down.weight"]
    )
    expected = {"proj_out.weight": product(file, "lora_unet_final_layer_linear")}
    for block in range(2):
        for stream, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            parts = product(file, f"lora_unet_double_blocks_{block}_{stream}_attn_qkv").chunk(3)
            for name, part in zip(names, parts, strict=True):
                expected[f"transformer_blocks.{block}.attn.{name}.weight"] = part
    agree(added(folders["flux"], path), expected)


def test_fluxs_last_modulation_has_its_halves_swapped(folders: dict[str, Path], tmp_path: Path) -> None:
    """diffusers' own conversion of this file is the oracle."""
    made = Made()
    made.layer("-", (64, 32), "lora_unet_final_layer_adaLN_modulation_1", ends=KOHYA)
    made.layer("-", (96, 32), "lora_unet_double_blocks_1_img_attn_qkv", ends=KOHYA)
    made.layer("-", (224, 32), "lora_unet_single_blocks_0_linear1", ends=KOHYA)
    ours = added(folders["flux"], made.save(tmp_path / "a.safetensors").path)
    rows = ours["single_transformer_blocks.0.attn.to_q.weight"], ours["single_transformer_blocks.0.proj_mlp.weight"]
    assert [tuple(part.shape) for part in rows] == [(32, 32), (128, 32)]
    whole = product(made.tensors, "lora_unet_single_blocks_0_linear1")
    assert torch.allclose(torch.cat([rows[0], rows[1]]), torch.cat([whole[:32], whole[96:]]), atol=1e-6)
    plain = {key: tensor for key, tensor in made.tensors.items() if "linear1" not in key}
    theirs = converted(FluxLoraLoaderMixin.lora_state_dict(plain))
    agree({name: update for name, update in ours.items() if "single" not in name}, theirs)


def test_wan_as_diffusers_converts_it(folders: dict[str, Path], tmp_path: Path) -> None:
    made = Made()
    for own in WAN_LAYERS:
        shape = {"ffn.0": (40, 24), "ffn.2": (24, 40)}.get(own, (24, 24))
        made.layer("-", shape, f"diffusion_model.blocks.0.{own}", alpha=1.5, ends=KOHYA)
    for name, shape in (
        ("time_projection.1", (144, 24)),
        ("text_embedding.0", (24, 16)),
        ("text_embedding.2", (24, 24)),
    ):
        made.layer("-", shape, f"diffusion_model.{name}", ends=KOHYA)
    ours = added(folders["wan"], made.save(tmp_path / "a.safetensors").path)
    agree(ours, converted(WanLoraLoaderMixin.lora_state_dict(dict(made.tensors))))


@pytest.mark.parametrize(
    "spell",
    [
        lambda layer: f"base_model.model.transformer.{layer}",
        lambda layer: f"_orig_mod.{layer}",
        lambda layer: f"transformer._orig_mod.module.{layer}",
        lambda layer: f"module.{layer.replace('layers.0.', 'layers.0._orig_mod.')}",
        lambda layer: f"unet.{layer}",
        lambda layer: f"model.diffusion_model.{layer}",
        lambda layer: f"diffusion_model.default.{layer}",
        lambda layer: f"lora_unet_{layer.replace('.', '_')}",
    ],
    ids=["peft", "compiled", "compiled-parallel", "compiled-blocks", "unet", "checkpoint", "adapter", "kohya"],
)
def test_prefixes_of_trainers_say_nothing(
    spell: Callable[[str], str], folders: dict[str, Path], tmp_path: Path
) -> None:
    made = Made()
    for layer in ("layers.0.attention.to_q", "noise_refiner.0.feed_forward.w1"):
        shape = (48, 48) if "attention" in layer else (128, 48)
        made.layer(f"{layer}.weight", shape, spell(layer), ends=(".lora_A.default.weight", ".lora_B.default.weight"))
    agree(added(folders["z_image"], made.save(tmp_path / "a.safetensors").path), made.added)


def test_an_alpha_is_one_number_of_any_dtype(folders: dict[str, Path]) -> None:
    path, layer = DATA / "alpha_i32.safetensors", "lora_unet_layers_0_attention_to_q"
    file = load_file(path)
    assert file[f"{layer}.alpha"].dtype is torch.int32
    agree(added(folders["z_image"], path), {"layers.0.attention.to_q.weight": product(file, layer)})
    path = DATA / "alpha_vec.safetensors"
    with pytest.raises(CheckpointError, match=rf"{path}: {layer}.alpha has the shape \(4,\)"):
        added(folders["z_image"], path)


def test_a_nan_is_refused_as_the_file_is_read(folders: dict[str, Path]) -> None:
    path = DATA / "nan_lora.safetensors"
    name = next(name for name, tensor in load_file(path).items() if not tensor.isfinite().all())
    with pytest.raises(CheckpointError, match=rf"{path}: {name} holds NaN or infinity"):
        added(folders["z_image"], path)


def test_a_fused_layer_of_another_size_is_the_one_blamed(folders: dict[str, Path], tmp_path: Path) -> None:
    made = Made()
    made.layer("-", (96, 32), "lora_unet_double_blocks_0_img_attn_qkv", ends=KOHYA)
    made.layer("-", (90, 32), "lora_unet_double_blocks_1_img_attn_qkv", ends=KOHYA)
    with pytest.raises(CheckpointError) as caught:
        added(folders["flux"], made.save(tmp_path / "a.safetensors").path)
    line = str(caught.value)
    assert "transformer_blocks.1.attn.to_q.weight + transformer_blocks.1.attn.to_k.weight + " in line
    assert "is (96, 32), its update (90, 3) times (3, 32) (lora_unet_double_blocks_1_img_attn_qkv)" in line
    assert "double_blocks_0" not in line
    save_file({"transformer.proj_out.diff": torch.ones(3, 32)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"proj_out.weight is \(16, 32\), its difference \(3, 32\)"):
        added(folders["flux"], tmp_path / "b.safetensors")
    save_file({"transformer.proj_out.diff_b": torch.ones(3, 32), "a.diff_b": torch.ones(1)}, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="1 of its 2 layers are not in transformer: a;"):
        added(folders["flux"], tmp_path / "c.safetensors")


# ---------------------------------------------------------------- the table of names, by diffusers' conversion


def publish(layers: Mapping[str, int], class_name: str, width: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights of one column in the publisher's names and in diffusers', for layers with so many rows each.

    Every row has a number of its own. The halves of a modulation of two times the width are swapped.
    """
    numbers = torch.arange(sum(layers.values()), dtype=torch.float64)[:, None].split(list(layers.values()))
    weights, ours, theirs = dict(zip(layers, numbers, strict=True)), {}, {}
    for own, rows in publisher_layers(class_name, layers).items():
        theirs |= {f"{name}.weight": weights[name] for name in rows.layers}
        whole = torch.cat([weights[name] for name in rows.layers])
        halves = torch.cat(whole.chunk(2)[::-1]) if rows.swapped and len(whole) == 2 * width else whole
        ours |= {f"{own}.weight": halves, f"{own}.bias": halves}
    return ours, theirs


def rows_of(kind: type, config: Mapping[str, object]) -> dict[str, int]:
    """Return the number of rows of every layer of a network."""
    with torch.device("meta"):
        network = kind.from_config(dict(config))
    named = network.named_parameters()
    return {name.removesuffix(".weight"): len(p) for name, p in named if not name.endswith(".bias")}


FLUX_NORMS = [f"{stream}_attn.norm.{part}.scale" for stream in ("img", "txt") for part in ("query_norm", "key_norm")]
SD3_NORMS = [f"{block}.attn.{part}.weight" for block in ("x_block", "context_block") for part in ("ln_q", "ln_k")]
ALL_OF_FLUX = FLUX | {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}
CONVERSIONS = {  # the network, its width, diffusers' conversion, and what that needs besides the layers
    "flux": (
        FluxTransformer2DModel,
        ALL_OF_FLUX | {"guidance_embeds": True},  # the width that diffusers' conversion takes for granted
        3072,
        single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
        [f"double_blocks.{n}.{norm}" for n in range(2) for norm in FLUX_NORMS]
        + [f"single_blocks.{n}.norm.{part}.scale" for n in range(2) for part in ("query_norm", "key_norm")],
    ),
    "sd3": (
        SD3Transformer2DModel,
        SD3,
        16,
        single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
        ["pos_embed", "context_embedder.bias", "joint_blocks.0.x_block.attn2.ln_q.weight"]
        + ["joint_blocks.0.x_block.attn2.ln_k.weight", "context_embedder.weight"]
        + [f"joint_blocks.{n}.{norm}" for n in range(3) for norm in SD3_NORMS],
    ),
    "wan": (WanTransformer3DModel, WAN, 24, single_file_utils.convert_wan_transformer_to_diffusers, []),
    "z_image": (
        ZImageTransformer2DModel,
        Z_IMAGE,
        48,
        single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
        [],
    ),
    "unet": (
        UNet2DConditionModel,
        UNET,
        16,
        lambda file: single_file_utils.convert_ldm_unet_checkpoint(
            {f"model.diffusion_model.{name}": tensor for name, tensor in file.items()}, UNET
        ),
        [],
    ),
}


@pytest.mark.parametrize("family", CONVERSIONS)
def test_the_layers_of_a_publisher_are_those_of_diffusers_conversion(family: str) -> None:
    kind, config, width, convert, others = CONVERSIONS[family]
    ours, theirs = publish(rows_of(kind, config), kind.__name__, width)
    found = convert(ours | {name: torch.zeros(16) for name in others})
    assert len(theirs) > 20
    for name, tensor in theirs.items():
        assert torch.equal(found[name], tensor), name


def test_pixarts_layers() -> None:
    """diffusers has no conversion of PixArt's names outside its scripts."""
    found = publisher_layers("PixArtTransformer2DModel", [f"transformer_blocks.3.attn2.to_{part}" for part in "qkv"])
    assert {own: rows.layers for own, rows in found.items()} == {
        "blocks.3.cross_attn.q_linear": ("transformer_blocks.3.attn2.to_q",),
        "blocks.3.cross_attn.kv_linear": ("transformer_blocks.3.attn2.to_k", "transformer_blocks.3.attn2.to_v"),
    }
