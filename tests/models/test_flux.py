"""The native FLUX computes what diffusers' FluxTransformer2DModel computes, from the same saved weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor

from models.attention import BACKENDS
from models.checkpoint_source import CheckpointSource
from models.components import Conditioning
from models.flux import NAMES, PLAN, Flux, load_denoiser, read_config
from models.layers import rotate
from tests.fixtures.models.parity import assert_config_refused, assert_names_map, assert_plan_fits, randomize, rel_l2

TINY: dict[str, object] = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 10,
    "axes_dims_rope": [4, 6, 6],
    "guidance_embeds": True,
}
CONFIGS = {
    "distilled": TINY,
    "not told a scale": TINY | {"guidance_embeds": False},
    "other axes, odd sizes": TINY
    | {"num_attention_heads": 3, "attention_head_dim": 12, "axes_dims_rope": [2, 4, 6], "in_channels": 12},
    "one block of each": TINY | {"num_layers": 1, "num_single_layers": 1, "out_channels": 16},
}
SIZES = ((10, 6), (2, 14), (8, 8))


def their(config: dict[str, object]) -> FluxTransformer2DModel:
    network = FluxTransformer2DModel.from_config(config).eval()
    randomize(network)
    return network


def our(
    theirs: FluxTransformer2DModel, folder: Path, backend: str = "sdpa", dtype: torch.dtype = torch.float32
) -> Flux:
    theirs.save_pretrained(folder / "transformer")
    return load_denoiser(CheckpointSource(folder, dtype=dtype), BACKENDS[backend])


def inputs(config: dict[str, object], batch: int, height: int, width: int) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, int(str(config["in_channels"])) // 4, height, width, generator=generator)
    text = torch.randn(batch, 7, 24, generator=generator)
    pooled = torch.randn(batch, 10, generator=generator)
    scale = torch.tensor([3.5, 1.0, 7.25])[:batch]
    return latent, torch.tensor([0.7, 333.25, 999.0])[:batch], Conditioning(text, pooled=pooled, scale=scale)


def expected(theirs: FluxTransformer2DModel, latent: Tensor, tau: Tensor, conditioning: Conditioning) -> Tensor:
    """Call the network as diffusers' pipeline does: packed latents, positions as inputs, a thousandth of tau."""
    batch, channels, height, width = latent.shape
    packed = FluxPipeline._pack_latents(latent, batch, channels, height, width)
    places = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, latent.device, latent.dtype)
    output = theirs(
        packed,
        encoder_hidden_states=conditioning.require_prompt_embeds(),
        pooled_projections=conditioning.require_pooled(),
        timestep=tau / 1000,
        img_ids=places,
        txt_ids=torch.zeros(conditioning.require_prompt_embeds().shape[1], 3),
        guidance=conditioning.scale if theirs.config.guidance_embeds else None,
    ).sample
    return FluxPipeline._unpack_latents(output, 8 * height, 8 * width, 8)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_parity_with_diffusers(name: str, batch: int, tmp_path: Path) -> None:
    theirs = their(CONFIGS[name])
    ours = our(theirs, tmp_path)
    for height, width in SIZES:
        latent, tau, conditioning = inputs(CONFIGS[name], batch, height, width)
        with torch.no_grad():
            assert rel_l2(ours(latent, tau, conditioning), expected(theirs, latent, tau, conditioning)) < 1e-5, (
                height,
                width,
            )


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_every_attention_backend_agrees(backend: str, tmp_path: Path) -> None:
    theirs = their(TINY)
    latent, tau, conditioning = inputs(TINY, 2, 6, 10)
    with torch.no_grad():
        assert (
            rel_l2(
                our(theirs, tmp_path, backend)(latent, tau, conditioning), expected(theirs, latent, tau, conditioning)
            )
            < 1e-5
        )


def test_every_input_matters(tmp_path: Path) -> None:
    ours = our(their(TINY), tmp_path)
    latent, tau, conditioning = inputs(TINY, 3, 6, 10)
    other = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = ours(latent, tau, conditioning)
        assert rel_l2(ours(latent.flip(0), tau, conditioning), plain) > 0.1
        assert rel_l2(ours(latent, tau + 100, conditioning), plain) > 0.01
        assert rel_l2(ours(latent, tau, replace(conditioning, prompt_embeds=other)), plain) > 0.01
        assert rel_l2(ours(latent, tau, replace(conditioning, pooled=conditioning.require_pooled() + 1)), plain) > 0.01
        assert rel_l2(ours(latent, tau, replace(conditioning, scale=torch.full((3,), 2.0))), plain) > 0.01
        for axis in (-1, -2):  # positions
            moved = ours(latent.roll(2, dims=axis), tau, conditioning).roll(-2, dims=axis)
            assert rel_l2(moved, plain) > 0.001


def test_a_batch_equals_its_single_images(tmp_path: Path) -> None:
    ours = our(their(TINY), tmp_path)
    latent, tau, conditioning = inputs(TINY, 3, 6, 10)
    with torch.no_grad():
        together = ours(latent, tau, conditioning)
        for k in range(3):
            row = slice(k, k + 1)
            assert conditioning.scale is not None
            alone = Conditioning(
                conditioning.require_prompt_embeds()[row],
                pooled=conditioning.require_pooled()[row],
                scale=conditioning.scale[row],
            )
            assert rel_l2(ours(latent[row], tau[row], alone)[0], together[k]) < 1e-6


def test_bfloat16_keeps_near_times_and_scales_apart(tmp_path: Path) -> None:
    """diffusers sees 900 and 901 as one number in bfloat16, whose steps are 4 there."""
    ours = our(their(TINY), tmp_path, dtype=torch.bfloat16)
    latent, _, conditioning = inputs(TINY, 1, 6, 10)
    conditioning = replace(conditioning.to(torch.bfloat16), scale=torch.tensor([3.5]))
    with torch.no_grad():
        plain = ours(latent.bfloat16(), torch.tensor([900.0]), conditioning)
        assert plain.dtype is torch.bfloat16
        assert not torch.equal(ours(latent.bfloat16(), torch.tensor([901.0]), conditioning), plain)
        assert not torch.equal(
            ours(latent.bfloat16(), torch.tensor([900.0]), replace(conditioning, scale=torch.tensor([3.501]))), plain
        )


def test_bfloat16_is_as_near_to_float32_as_diffusers_is(tmp_path: Path) -> None:
    theirs = their(TINY)
    ours = our(theirs, tmp_path, dtype=torch.bfloat16)
    latent, tau, conditioning = inputs(TINY, 3, 6, 10)
    tau = torch.tensor([250.0, 500.0, 1000.0])  # bfloat16 has these, and a thousand times those, so that the rounding
    conditioning = replace(conditioning, scale=torch.tensor([1.0, 2.0, 4.0]))  # of the inputs plays no part
    with torch.no_grad():
        exact = expected(theirs, latent, tau, conditioning)
        mine = rel_l2(ours(latent.bfloat16(), tau, conditioning.to(torch.bfloat16)).float(), exact)
        theirs.bfloat16()
        low = replace(conditioning.to(torch.bfloat16), scale=conditioning.scale)
        peers = rel_l2(expected(theirs, latent.bfloat16(), tau, low).float(), exact)
    assert mine < 1.2 * peers < 0.05


def test_a_turned_pair_keeps_its_length() -> None:
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    turned = rotate(x, torch.stack([angles.cos(), angles.sin()]))
    torch.testing.assert_close(turned.unflatten(-1, (-1, 2)).norm(dim=-1), x.unflatten(-1, (-1, 2)).norm(dim=-1))
    back = rotate(turned, torch.stack([angles.cos(), -angles.sin()]))
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_names_map_one_to_one_and_the_plan_fits(name: str, tmp_path: Path) -> None:
    theirs = their(CONFIGS[name])
    ours = our(theirs, tmp_path)
    assert_names_map(ours, theirs.state_dict(), NAMES)
    assert_plan_fits(ours, PLAN)


def test_a_mask_and_missing_inputs_are_refused(tmp_path: Path) -> None:
    ours = our(their(TINY), tmp_path)
    latent, tau, conditioning = inputs(TINY, 1, 4, 4)
    for change, says in (
        ({"mask": torch.ones(1, 7, dtype=torch.bool)}, "must have no mask"),
        ({"prompt_embeds": None}, "needs prompt embeddings"),
        ({"pooled": None}, "needs a pooled"),
        ({"scale": None}, "guidance scale"),
    ):
        with pytest.raises(ValueError, match=says):
            ours(latent, tau, replace(conditioning, **change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "loads FluxTransformer2DModel"),
        ({"in_channels": 96, "out_channels": 16}, "text-to-image"),
        ({"patch_size": 2}, "packed 2 x 2"),
        ({"in_channels": 18}, "packed 2 x 2"),
        ({"num_layers": "many"}, "num_layers"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"axes_dims_rope": [4, 4, 4]}, "add up to 16"),
        ({"axes_dims_rope": [5, 5, 6]}, "even numbers"),
    ],
)
def test_a_config_of_another_network_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    assert_config_refused(read_config, tmp_path, TINY | change, says)


def test_what_a_config_leaves_out_is_diffusers_default(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with torch.device("meta"):
        theirs = FluxTransformer2DModel()
        ours = Flux(read_config(tmp_path))
    assert_names_map(ours, theirs.state_dict(), NAMES)
    assert ours.config.axes == tuple(theirs.config.axes_dims_rope)
