"""diffusers' UNets give the same output with this package's attention in them, from files of any age."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.attention import BACKENDS, math_attention, sdpa_attention
from models.checkpoint_source import CheckpointSource
from models.components import Conditioning
from models.decoders import load_kl_decoder
from models.files import CheckpointError
from models.registry import PUBLISHED
from models.unet import PLAN, route_attention, sd, sdxl, unconditional
from models.unet.network import ConditionalUNet, SizeConditionedUNet, UnconditionalUNet
from tests.fixtures.models.parity import assert_plan_fits, randomize, rel_l2
from tests.fixtures.models.unet import NCSNPP, PLAIN, POOLED, SIZED, SMALL, TEXT, _blocks

BOUND = 1e-5  # relative L2, float32
TOKENS = 7
STRIDE = 4  # of the VAE beside SDXL's network

CONDITIONAL: dict[str, dict[str, Any]] = {
    "first generation": SMALL,
    "second generation": SMALL
    | {"attention_head_dim": [2, 4, 4], "use_linear_projection": True, "upcast_attention": True},
    "two layers, no attention in the middle": SMALL
    | {"layers_per_block": 2, "transformer_layers_per_block": 2, "mid_block_type": None},
    "centred input, scaled by time": SMALL
    | {"center_input_sample": True, "resnet_time_scale_shift": "scale_shift", "mid_block_scale_factor": 1.5},
    "text of another width": SMALL | {"encoder_hid_dim": TEXT, "cross_attention_dim": 9},
    "attention to the text alone": SMALL | {"only_cross_attention": True},
    "norms of the text": {
        "block_out_channels": [32, 64, 64],
        "down_block_types": ["KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"],
        "up_block_types": ["KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"],
        "mid_block_type": None,
        "layers_per_block": 2,
        "norm_num_groups": None,
        "cross_attention_dim": TEXT,
        "attention_head_dim": 8,
        "time_embedding_type": "fourier",
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
    },
}
UNCONDITIONAL: dict[str, dict[str, Any]] = {
    "ddpm": PLAIN,
    "ncsn++": NCSNPP,
    "several heads": PLAIN | {"attention_head_dim": 4, "downsample_padding": 1, "flip_sin_to_cos": True},
    "resnets that resample": PLAIN
    | {"downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift"},
    "attention nowhere": PLAIN
    | {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3, "add_attention": False},
    "groups of its own in the middle": PLAIN
    | {"attn_norm_num_groups": 8, "resnet_time_scale_shift": "scale_shift", "mid_block_scale_factor": 2.0},
}


def with_backends(names: list[str]) -> list[tuple[str, str]]:
    """Return every configuration with the default kernel, and the first with all kernels."""
    return [(names[0], backend) for backend in BACKENDS] + [(name, "sdpa") for name in names[1:]]


def saved(kind: type, config: dict[str, Any], folder: Path) -> Any:
    """Save diffusers' network with random weights as `unet/`, beside an SDXL checkpoint's other configurations."""
    theirs = kind(**config)
    randomize(theirs)
    theirs.save_pretrained(folder / "unet")
    for name, other in {
        "vae": {"block_out_channels": [8, 8, 8]},
        "text_encoder_2": {"projection_dim": POOLED},
    }.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(other))
    return theirs.eval()


def source(folder: Path, **options: Any) -> CheckpointSource:
    return CheckpointSource(folder, "unet", **options)


def inputs(channels: int, batch: int, height: int, width: int) -> tuple[Tensor, Tensor, Conditioning]:
    """Return a latent, times, and text with a mask that hides another number of tokens of each prompt."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, channels, height, width, generator=generator)
    text = torch.randn(batch, TOKENS, TEXT, generator=generator)
    mask = torch.arange(TOKENS)[None] < torch.tensor([3, TOKENS, 1])[:batch, None]
    pooled = torch.randn(batch, POOLED, generator=generator)
    return latent, torch.tensor([7.0, 333.25, 980.0])[:batch], Conditioning(text, mask, pooled)


def unmasked(condition: Conditioning) -> Conditioning:
    return Conditioning(condition.prompt_embeds, pooled=condition.pooled)


@torch.no_grad()
@pytest.mark.parametrize(("name", "backend"), with_backends(list(CONDITIONAL)))
def test_text_networks_agree_with_diffusers(name: str, backend: str, tmp_path: Path) -> None:
    theirs = saved(UNet2DConditionModel, CONDITIONAL[name], tmp_path)
    ours = sd.load_denoiser(source(tmp_path), BACKENDS[backend])
    odd = (12, 20) if name == "norms of the text" else (10, 6)  # its blocks halve even sides only
    for batch, height, width in ((1, 8, 8), (3, 12, 20), (3, *odd)):
        latent, tau, condition = inputs(4, batch, height, width)
        for conditioning in (condition, unmasked(condition)):
            expected = theirs(latent, tau, conditioning.prompt_embeds, encoder_attention_mask=conditioning.mask).sample
            assert rel_l2(ours(latent, tau, conditioning), expected) < BOUND, (batch, height, width)


@torch.no_grad()
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_the_network_that_gets_sizes_agrees_with_diffusers(backend: str, tmp_path: Path) -> None:
    theirs = saved(UNet2DConditionModel, SIZED, tmp_path)
    ours = sdxl.load_denoiser(source(tmp_path), BACKENDS[backend])
    for batch, height, width in ((1, 8, 8), (3, 12, 20), (3, 10, 6)):
        latent, tau, condition = inputs(4, batch, height, width)
        pixels = (STRIDE * height, STRIDE * width)
        sizes = torch.tensor([[*pixels, 0, 0, *pixels]] * batch)
        for conditioning in (condition, unmasked(condition)):
            added = {"text_embeds": conditioning.pooled, "time_ids": sizes}
            expected = theirs(
                latent,
                tau,
                conditioning.prompt_embeds,
                encoder_attention_mask=conditioning.mask,
                added_cond_kwargs=added,
            ).sample
            assert rel_l2(ours(latent, tau, conditioning), expected) < BOUND, (batch, height, width)


@torch.no_grad()
@pytest.mark.parametrize(("name", "backend"), with_backends(list(UNCONDITIONAL)))
def test_networks_without_text_agree_with_diffusers(name: str, backend: str, tmp_path: Path) -> None:
    theirs = saved(UNet2DModel, UNCONDITIONAL[name], tmp_path)
    ours = unconditional.load_denoiser(source(tmp_path), BACKENDS[backend])
    for batch, height, width in ((1, 16, 16), (3, 12, 20), (3, 4, 8)):
        latent, tau, _ = inputs(3, batch, height, width)
        assert rel_l2(ours(latent, tau, Conditioning()), theirs(latent, tau).sample) < BOUND, (batch, height, width)


@torch.no_grad()
def test_every_input_matters(tmp_path: Path) -> None:
    saved(UNet2DConditionModel, SIZED, tmp_path)
    network = sdxl.load_denoiser(source(tmp_path))
    latent, tau, condition = inputs(4, 3, 12, 20)
    assert condition.prompt_embeds is not None
    assert condition.mask is not None
    assert condition.pooled is not None
    plain = network(latent, tau, condition)
    other = torch.randn(condition.prompt_embeds.shape, generator=torch.Generator().manual_seed(2))
    hidden = torch.where(condition.mask[..., None], condition.prompt_embeds, other)
    seen = torch.where(condition.mask[..., None], other, condition.prompt_embeds)
    assert torch.equal(network(latent, tau, Conditioning(hidden, condition.mask, condition.pooled)), plain)
    changed = {
        "time": network(latent, tau + 100, condition),
        "text": network(latent, tau, Conditioning(seen, condition.mask, condition.pooled)),
        "mask": network(latent, tau, unmasked(condition)),
        "pooled": network(latent, tau, Conditioning(condition.prompt_embeds, condition.mask, condition.pooled.flip(0))),
        "latent": network(latent.flip(-1), tau, condition).flip(-1),
        "size": SizeConditionedUNet(network.unet, 2 * STRIDE)(latent, tau, condition),
    }
    for name, output in changed.items():
        assert rel_l2(output, plain) > 0.001, name


@torch.no_grad()
def test_networks_without_text_get_the_time(tmp_path: Path) -> None:
    for name in ("ddpm", "ncsn++"):
        saved(UNet2DModel, UNCONDITIONAL[name], tmp_path)
        network = unconditional.load_denoiser(source(tmp_path))
        latent, tau, condition = inputs(3, 3, 16, 16)
        scale = (tau + 100) / tau if name == "ncsn++" else torch.ones(3)  # its output is a score, divided by tau
        later = network(latent, tau + 100, condition) * scale[:, None, None, None]
        assert rel_l2(later, network(latent, tau, condition)) > 0.001


@torch.no_grad()
def test_a_batch_equals_its_single_images(tmp_path: Path) -> None:
    saved(UNet2DConditionModel, SIZED, tmp_path)
    network = sdxl.load_denoiser(source(tmp_path))
    latent, tau, conditioning = inputs(4, 3, 12, 20)
    together = network(latent, tau, conditioning)
    for k in range(3):
        row = Conditioning(
            conditioning.prompt_embeds[k : k + 1], conditioning.mask[k : k + 1], conditioning.pooled[k : k + 1]
        )  # type: ignore[index]
        assert rel_l2(network(latent[k : k + 1], tau[k : k + 1], row)[0], together[k]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", [UNet2DConditionModel, UNet2DModel])
def test_every_attention_layer_goes_through_the_kernel(kind: type, tmp_path: Path) -> None:
    requested: list[tuple[int, ...]] = []

    def counting(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        requested.append(tuple(k.shape[1:3]))
        return math_attention(q, k, v, mask)

    config, module = (SMALL, sd) if kind is UNet2DConditionModel else (PLAIN, unconditional)
    saved(kind, config, tmp_path)
    network = module.load_denoiser(source(tmp_path), counting)  # type: ignore[attr-defined]
    layers = [layer for layer in network.modules() if isinstance(layer, Attention)]
    latent, tau, condition = inputs(config.get("in_channels", 4 if kind is UNet2DConditionModel else 3), 1, 8, 8)
    network(latent, tau, condition)
    assert len(requested) == len(layers) > 3
    if kind is UNet2DConditionModel:
        assert sum(tokens == TOKENS for tokens, _ in requested) == len(layers) / 2  # self-attention and to the text
        assert {heads for _, heads in requested} == {2}


def test_a_plan_has_nothing_to_shard(tmp_path: Path) -> None:
    assert_plan_fits(ConditionalUNet(UNet2DConditionModel(**SMALL)), PLAN)
    assert PLAN.heads is None
    assert PLAN.stacks == PLAN.column == PLAN.row == ()


# ---------------------------------------------------------------- files

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def aged(file: Path) -> int:
    """Give the attention layers in a file the names that they had before 2023; return how many names changed."""
    tensors = {}
    for name, tensor in load_file(file).items():
        old = name
        for today, then in OLD.items():
            old = old.replace(f".{today}.", f".{then}.")
        tensors[old] = tensor
    changed = len(tensors.keys() - load_file(file).keys())
    save_file(tensors, file, {"format": "pt"})
    return changed


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddpm", "ncsn++"])
def test_old_files_of_a_network_load(name: str, tmp_path: Path) -> None:
    theirs = saved(UNet2DModel, UNCONDITIONAL[name], tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    assert aged(file) == 8 * sum(isinstance(layer, Attention) for layer in theirs.modules())
    if name == "ncsn++":
        tensors = load_file(file)
        tensors["time_proj.W"] = tensors["time_proj.weight"].clone()  # both were written
        save_file(tensors, file, {"format": "pt"})
    reloaded = UNet2DModel.from_pretrained(tmp_path / "unet", low_cpu_mem_usage=False)
    ours = unconditional.load_denoiser(source(tmp_path))
    latent, tau, condition = inputs(3, 2, 16, 16)
    expected = theirs(latent, tau).sample
    assert torch.equal(reloaded(latent, tau).sample, expected)
    assert rel_l2(ours(latent, tau, condition), expected) < BOUND
    if name == "ncsn++":
        del tensors["time_proj.weight"]
        save_file(tensors, file, {"format": "pt"})
        assert rel_l2(unconditional.load_denoiser(source(tmp_path))(latent, tau, condition), expected) < BOUND


@torch.no_grad()
@pytest.mark.parametrize("old", [False, True], ids=["today's names", "old names"])
def test_files_of_an_autoencoder_load(old: bool, tmp_path: Path) -> None:
    theirs = AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, **_blocks(2)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "vae")
    if old:
        assert aged(tmp_path / "vae" / "diffusion_pytorch_model.safetensors") == 16
    latent = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(3))
    expected = theirs.decode(latent / theirs.config.scaling_factor).sample
    assert rel_l2(load_kl_decoder(source(tmp_path))(latent), (expected / 2 + 0.5).clamp(0, 1)) < BOUND


def test_a_network_is_loaded_in_its_dtype_and_gets_the_time_in_float32(tmp_path: Path) -> None:
    saved(UNet2DConditionModel, SIZED, tmp_path)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.bfloat16).eval()
    ours = sdxl.load_denoiser(source(tmp_path, dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    latent, tau, condition = inputs(4, 3, 12, 20)
    fed, conditioning = latent.bfloat16(), unmasked(condition).to(torch.bfloat16)
    pixels = (STRIDE * 12, STRIDE * 20)
    added = {"text_embeds": conditioning.pooled, "time_ids": torch.tensor([[*pixels, 0, 0, *pixels]] * 3)}
    with torch.no_grad():
        expected = theirs(fed, tau, conditioning.prompt_embeds, added_cond_kwargs=added).sample
        assert rel_l2(ours(fed, tau, conditioning).float(), expected.float()) < 0.01


def rewrite(folder: Path, component: str, **changes: object) -> None:
    file = folder / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("module", "changes", "says"),
    [
        (sd, {"_class_name": "UNet2DModel"}, "loads UNet2DConditionModel"),
        (sd, {"addition_embed_type": "text_time"}, "use model.architecture=sdxl"),
        (sd, {"addition_embed_type": "image"}, "addition_embed_type=image, which is not supported"),
        (
            sd,
            {"class_embed_type": "timestep"},
            "class_embed_type=timestep is not supported .it is conditioned on classes",
        ),
        (sd, {"num_class_embeds": 10}, "num_class_embeds=10 is not supported"),
        (sd, {"time_cond_proj_dim": 8}, "conditioned on the guidance scale"),
        (sd, {"encoder_hid_dim_type": "image_proj"}, "conditioned on images"),
        (sd, {"attention_type": "gated"}, "attention_type=gated is not supported"),
        (sd, {"dual_cross_attention": True}, "dual_cross_attention=True is not supported"),
        (sd, {"in_channels": 9}, "in_channels=9 and out_channels=4; networks for inpainting"),
        (sd, {"out_channels": 8}, "learned variance"),
        (sd, {"block_out_channels": [8, 16]}, "unet cannot be built from its config.json"),
        (sdxl, {}, "addition_embed_type=None; use model.architecture=sd$"),
        (unconditional, {}, "loads UNet2DModel"),
        (
            unconditional,
            {"_class_name": "UNet2DModel", "time_embedding_type": "learned"},
            "time_embedding_type=learned is not supported",
        ),
    ],
)
def test_a_foreign_configuration_is_refused(module: Any, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    saved(UNet2DConditionModel, SMALL, tmp_path)
    rewrite(tmp_path, "unet", **changes)
    with pytest.raises(CheckpointError, match=says) as caught:
        module.load_denoiser(source(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_refiner_is_refused(tmp_path: Path) -> None:
    saved(UNet2DConditionModel, SIZED, tmp_path)
    rewrite(tmp_path, "text_encoder_2", projection_dim=POOLED + 6)  # five numbers of the size instead of six
    with pytest.raises(CheckpointError, match="the refiner is not supported"):
        sdxl.load(source(tmp_path), sdpa_attention)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"added_kv_proj_dim": 4}, "keys and values of its own"),
        ({"spatial_norm_dim": 4}, "a spatial norm"),
        ({"qk_norm": "layer_norm"}, "norms of queries and keys"),
        ({"scale_qk": False}, "another scale"),
        ({"kv_heads": 1}, "fewer heads"),
    ],
)
def test_an_attention_layer_that_computes_something_else_is_refused(options: dict[str, Any], says: str) -> None:
    network = torch.nn.Sequential(Attention(32, heads=2, dim_head=4, **options))
    with pytest.raises(CheckpointError, match=f"checkpoint: the attention layer 0 has {says}.* is not supported"):
        route_attention(network, sdpa_attention, "checkpoint")


def test_missing_conditioning_is_named(tmp_path: Path) -> None:
    saved(UNet2DConditionModel, SIZED, tmp_path)
    network = sdxl.load_denoiser(source(tmp_path))
    latent, tau, condition = inputs(4, 1, 8, 8)
    with pytest.raises(ValueError, match="needs a pooled text vector"):
        network(latent, tau, Conditioning(condition.prompt_embeds))
    with pytest.raises(ValueError, match="needs prompt embeddings"):
        network(latent, tau, Conditioning(pooled=condition.pooled))


@pytest.mark.parametrize("name", ["ddpm_cifar10", "ncsnpp_church"])
def test_published_networks_without_text_generate_any_multiple_of_their_size(name: str) -> None:
    """At full size on the meta device, with the smallest image that size_multiple allows."""
    here = CheckpointSource(PUBLISHED / name, "unet", device=torch.device("meta"), dummy=True)
    parts = unconditional.load(here, sdpa_attention)
    assert isinstance(parts.network, UnconditionalUNet)
    side = parts.size_multiple
    with torch.device("meta"):
        generated = parts.network(torch.zeros(2, 3, side, 2 * side), torch.ones(2), Conditioning())
    assert generated.shape == (2, *parts.latent.shape(side, 2 * side))
    assert parts.capturable is (name == "ddpm_cifar10")
