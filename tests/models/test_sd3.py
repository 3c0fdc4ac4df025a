"""The native SD3 computes what diffusers' SD3Transformer2DModel computes, from the same saved weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from models.attention import BACKENDS
from models.checkpoint_source import CheckpointSource
from models.components import Conditioning
from models.sd3 import NAMES, PLAN, SD3, load_denoiser, read_config
from tests.fixtures.models.parity import assert_config_refused, assert_names_map, assert_plan_fits, randomize, rel_l2

TINY: dict[str, object] = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 10,
    "out_channels": 4,
    "pos_embed_max_size": 11,
}
NORMED = TINY | {"qk_norm": "rms_norm"}
CONFIGS = {
    "3": TINY,
    "3.5 large": NORMED,
    "3.5 medium": NORMED | {"dual_attention_layers": [0, 1]},
    "dual in the last block": TINY | {"dual_attention_layers": [2], "num_attention_heads": 2, "attention_head_dim": 16},
    "patch 1, odd sizes": TINY
    | {
        "patch_size": 1,
        "in_channels": 3,
        "out_channels": None,
        "num_layers": 1,
        "num_attention_heads": 3,
        "attention_head_dim": 12,
        "caption_projection_dim": 36,
        "sample_size": 7,
        "pos_embed_max_size": 22,
    },
}
SIZES = ((10, 6), (2, 14), (16, 16), (22, 4))


def their(config: dict[str, object]) -> SD3Transformer2DModel:
    """Make diffusers' network with random weights everywhere, and a position table that no formula gives."""
    network = SD3Transformer2DModel.from_config(config).eval()
    randomize(network)
    table = network.pos_embed.pos_embed
    table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(3)))
    return network


def our(theirs: SD3Transformer2DModel, folder: Path, backend: str = "sdpa", dtype: torch.dtype = torch.float32) -> SD3:
    theirs.save_pretrained(folder / "transformer")
    return load_denoiser(CheckpointSource(folder, dtype=dtype), BACKENDS[backend])


def inputs(config: dict[str, object], batch: int, height: int, width: int) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, int(str(config["in_channels"])), height, width, generator=generator)
    text = torch.randn(batch, 7, 24, generator=generator)
    pooled = torch.randn(batch, 10, generator=generator)
    return latent, torch.tensor([0.7, 333.25, 999.0])[:batch], Conditioning(text, pooled=pooled)


def expected(theirs: SD3Transformer2DModel, latent: Tensor, tau: Tensor, conditioning: Conditioning) -> Tensor:
    return theirs(
        latent,
        encoder_hidden_states=conditioning.require_prompt_embeds(),
        pooled_projections=conditioning.require_pooled(),
        timestep=tau,
    ).sample


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
    config = CONFIGS["3.5 medium"]
    theirs = their(config)
    latent, tau, conditioning = inputs(config, 2, 6, 10)
    with torch.no_grad():
        assert (
            rel_l2(
                our(theirs, tmp_path, backend)(latent, tau, conditioning), expected(theirs, latent, tau, conditioning)
            )
            < 1e-5
        )


def test_every_input_matters(tmp_path: Path) -> None:
    config = CONFIGS["3.5 medium"]
    ours = our(their(config), tmp_path)
    latent, tau, conditioning = inputs(config, 3, 6, 10)
    other = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = ours(latent, tau, conditioning)
        assert rel_l2(ours(latent.flip(0), tau, conditioning), plain) > 0.1
        assert rel_l2(ours(latent, tau + 100, conditioning), plain) > 0.01
        assert rel_l2(ours(latent, tau, replace(conditioning, prompt_embeds=other)), plain) > 0.01
        assert rel_l2(ours(latent, tau, replace(conditioning, pooled=conditioning.require_pooled() + 1)), plain) > 0.01
        for axis in (-1, -2):  # positions
            moved = ours(latent.roll(2, dims=axis), tau, conditioning).roll(-2, dims=axis)
            assert rel_l2(moved, plain) > 0.001


def test_a_batch_equals_its_single_images(tmp_path: Path) -> None:
    config = CONFIGS["3.5 medium"]
    ours = our(their(config), tmp_path)
    latent, tau, conditioning = inputs(config, 3, 6, 10)
    with torch.no_grad():
        together = ours(latent, tau, conditioning)
        for k in range(3):
            row = slice(k, k + 1)
            alone = Conditioning(conditioning.require_prompt_embeds()[row], pooled=conditioning.require_pooled()[row])
            assert rel_l2(ours(latent[row], tau[row], alone)[0], together[k]) < 1e-6


def test_bfloat16_is_as_near_to_float32_as_diffusers_is(tmp_path: Path) -> None:
    config = CONFIGS["3.5 medium"]
    theirs = their(config)
    ours = our(theirs, tmp_path, dtype=torch.bfloat16)
    latent, tau, conditioning = inputs(config, 3, 6, 10)
    with torch.no_grad():
        exact = expected(theirs, latent, tau, conditioning)
        low = conditioning.to(torch.bfloat16)
        mine = rel_l2(ours(latent.bfloat16(), tau, low).float(), exact)
        peers = rel_l2(expected(theirs.bfloat16(), latent.bfloat16(), tau, low).float(), exact)
    assert mine < 1.2 * peers < 0.05


@pytest.mark.parametrize("name", list(CONFIGS))
def test_names_map_one_to_one_and_the_plan_fits(name: str, tmp_path: Path) -> None:
    theirs = their(CONFIGS[name])
    ours = our(theirs, tmp_path)
    assert_names_map(ours, theirs.state_dict(), NAMES)
    if name == "3.5 medium":  # the network with every linear that the plan names
        assert_plan_fits(ours, PLAN)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_random_weights_have_diffusers_own_positions(name: str, tmp_path: Path) -> None:
    """Where no checkpoint brings a table, the table is diffusers' own."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    ours = load_denoiser(CheckpointSource(tmp_path, dummy=True))
    theirs = SD3Transformer2DModel.from_config(CONFIGS[name])
    torch.testing.assert_close(ours.get_buffer("positions"), theirs.pos_embed.pos_embed, rtol=0, atol=1e-6)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    ours = our(their(TINY), tmp_path)
    latent, tau, conditioning = inputs(TINY, 1, 4, 24)
    with pytest.raises(ValueError, match="positions for 11 per side"):
        ours(latent, tau, conditioning)
    for change, says in (
        ({"mask": torch.ones(1, 7, dtype=torch.bool)}, "must have no mask"),
        ({"prompt_embeds": None}, "needs prompt embeddings"),
        ({"pooled": None}, "needs a pooled"),
    ):
        with pytest.raises(ValueError, match=says):
            ours(latent[..., :4], tau, replace(conditioning, **change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "loads SD3Transformer2DModel"),
        ({"out_channels": 8}, "out_channels is not in_channels"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        ({"caption_projection_dim": 24}, "the width of the image tokens, 32"),
        ({"num_layers": "many"}, "num_layers"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size"),
    ],
)
def test_a_config_of_another_network_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    assert_config_refused(read_config, tmp_path, TINY | change, says)


def test_what_a_config_leaves_out_is_diffusers_default(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel"}))
    with torch.device("meta"):
        theirs = SD3Transformer2DModel()
        ours = SD3(read_config(tmp_path))
    assert_names_map(ours, theirs.state_dict(), NAMES)
    assert ours.config.sample_size == theirs.config.sample_size
