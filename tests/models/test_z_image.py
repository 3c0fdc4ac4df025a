"""The native network computes what diffusers' ZImageTransformer2DModel computes, from the same weights."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from models.attention import BACKENDS
from models.checkpoint_source import CheckpointSource
from models.components import Conditioning
from models.registry import PUBLISHED
from models.z_image import NAMES, PLAN, ZImage, load_denoiser, read_config
from tests.fixtures.models.parity import assert_config_refused, assert_names_map, assert_plan_fits, randomize, rel_l2

SMALL = {
    "in_channels": 4,
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 24,
    "axes_dims": [4, 6, 6],
    "axes_lens": [512, 64, 64],
}
CONFIGS = {
    "small": SMALL,
    "queries and keys as they are": SMALL | {"qk_norm": False},
    "other numbers": SMALL | {"norm_eps": 1e-2, "rope_theta": 10_000.0, "t_scale": 50.0},
    "wider than the time": SMALL | {"dim": 288, "n_layers": 1, "n_refiner_layers": 1, "axes_dims": [32, 32, 32]},
    "no refiners": SMALL | {"n_refiner_layers": 0},
}
SIZES = ((6, 14), (10, 2), (16, 16))
LENGTHS = {"one short": (7,), "one full": (32,), "equal": (9, 9, 9), "apart": (40, 7, 32), "far apart": (129, 1, 33)}


def their(options: dict[str, object]) -> ZImageTransformer2DModel:
    """Make diffusers' network with random weights everywhere, the padding tokens too."""
    network = ZImageTransformer2DModel(**options).eval()
    randomize(network)
    return network


def our(theirs: ZImageTransformer2DModel, folder: Path, backend: str = "sdpa") -> ZImage:
    theirs.save_pretrained(folder / "transformer")
    return load_denoiser(CheckpointSource(folder), BACKENDS[backend])


def inputs(network: ZImage, lengths: tuple[int, ...], height: int, width: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return a latent, times, and text states of these lengths, one row each."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(len(lengths), network.config.latent_channels, height, width, generator=generator)
    text = [torch.randn(1, length, network.config.text_channels, generator=generator) for length in lengths]
    return latent, torch.tensor([0.7, 333.25, 999.0])[: len(lengths)], text


def stacked(text: list[Tensor]) -> Conditioning:
    return Conditioning.stack([Conditioning(prompt_embeds) for prompt_embeds in text])


def predict(theirs: ZImageTransformer2DModel, latent: Tensor, tau: Tensor, text: list[Tensor]) -> Tensor:
    """Call diffusers' network with the sign that its pipeline uses."""
    output = theirs(list(latent.unsqueeze(2)), (1000 - tau) / 1000, [row[0] for row in text], return_dict=False)[0]
    return -torch.stack(output)[:, :, 0]


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_parity_with_diffusers(backend: str, name: str, tmp_path: Path) -> None:
    theirs = their(CONFIGS[name])
    ours = our(theirs, tmp_path, backend)
    for case, lengths in LENGTHS.items():
        for height, width in SIZES:
            latent, tau, text = inputs(ours, lengths, height, width)
            with torch.no_grad():
                expected = predict(theirs, latent, tau, text)
                assert rel_l2(ours(latent, tau, stacked(text)), expected) < 1e-5, (case, height, width)


def test_every_input_matters(tmp_path: Path) -> None:
    """Parity proves nothing where the output does not depend on what is compared."""
    network = our(their(SMALL), tmp_path)
    latent, tau, text = inputs(network, (40, 7, 33), 6, 10)
    condition = stacked(text)
    assert condition.prompt_embeds is not None
    assert condition.mask is not None
    other = torch.randn(condition.prompt_embeds.shape, generator=torch.Generator().manual_seed(2))
    hidden = torch.where(condition.mask[..., None], condition.prompt_embeds, other)
    seen = torch.where(condition.mask[..., None], other, condition.prompt_embeds)
    with torch.no_grad():
        plain = network(latent, tau, condition)
        assert rel_l2(network(latent, tau + 100, condition), plain) > 0.01
        assert rel_l2(network(latent, tau, Conditioning(seen, condition.mask)), plain) > 0.01
        assert rel_l2(network(latent, tau, Conditioning(condition.prompt_embeds)), plain) > 0.001
        assert torch.equal(network(latent, tau, Conditioning(hidden, condition.mask)), plain)
        shifted = network(latent.roll(2, dims=-1), tau, condition).roll(-2, dims=-1)
        assert rel_l2(shifted, plain) > 0.001  # positions
        turned = network(latent, tau, stacked([prompt_embeds.flip(1) for prompt_embeds in text]))
        assert rel_l2(turned, plain) > 0.001  # the text's too
        with pytest.raises(ValueError, match="prompt embeddings"):
            network(latent, tau, Conditioning())


@pytest.mark.parametrize("name", ["image_pad", "text_pad"])
def test_the_tokens_that_fill_up_matter(name: str, tmp_path: Path) -> None:
    network = our(their(SMALL), tmp_path)
    latent, tau, text = inputs(network, (7,), 6, 10)
    with torch.no_grad():
        plain = network(latent, tau, stacked(text))
        network.get_parameter(name).add_(1)
        assert rel_l2(network(latent, tau, stacked(text)), plain) > 0.001


def test_a_batch_equals_its_single_images(tmp_path: Path) -> None:
    network = our(their(SMALL), tmp_path)
    latent, tau, text = inputs(network, (70, 7, 33), 6, 10)
    with torch.no_grad():
        together = network(latent, tau, stacked(text))
        for k in range(3):
            alone = network(latent[k : k + 1], tau[k : k + 1], Conditioning(text[k]))
            assert rel_l2(alone[0], together[k]) < 1e-6


def test_bfloat16_stays_near(tmp_path: Path) -> None:
    """The output is as near to float32 as that of diffusers' network in bfloat16."""
    theirs = their(SMALL)
    ours = our(theirs, tmp_path)
    latent, tau, text = inputs(ours, (40, 7, 32), 6, 14)
    with torch.no_grad():
        exact = ours(latent, tau, stacked(text))
        low, low_text = latent.bfloat16(), [prompt_embeds.bfloat16() for prompt_embeds in text]
        output = ours.bfloat16()(low, tau, stacked(low_text))
        peer = predict(theirs.bfloat16(), low, tau, low_text)
    assert output.dtype == torch.bfloat16
    assert rel_l2(output.float(), exact) < min(0.03, 1.2 * rel_l2(peer.float(), exact))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_names_map_one_to_one(name: str, tmp_path: Path) -> None:
    theirs = their(CONFIGS[name])
    assert_names_map(our(theirs, tmp_path), theirs.state_dict(), NAMES)


@pytest.mark.parametrize("name", ["z_image_turbo", "z_image"])
def test_names_of_the_published_networks_map_one_to_one(name: str) -> None:
    folder = PUBLISHED / name / "transformer"
    with torch.device("meta"):
        theirs = ZImageTransformer2DModel.from_config(ZImageTransformer2DModel.load_config(folder))
        ours = ZImage(read_config(folder))
    assert_names_map(ours, theirs.state_dict(), NAMES)
    assert_plan_fits(ours, PLAN)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 6_154_908_736


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"_class_name": "Lumina2Transformer2DModel"}, "this network loads ZImageTransformer2DModel"),
        ({"siglip_feat_dim": 1152}, "Z-Image-Omni"),
        ({"n_layers": None}, "no whole number under n_layers"),
        ({"t_scale": "1000"}, "no number above 0 under t_scale"),
        ({"all_patch_size": [2, 4], "all_f_patch_size": [1, 1]}, r"all_patch_size=\[2, 4\]"),
        ({"all_f_patch_size": [2]}, r"all_f_patch_size=\[2\]"),
        ({"n_kv_heads": 10}, "n_kv_heads=10 is not n_heads=30"),
        ({"axes_dims": [32, 48]}, "three even numbers"),
        ({"axes_dims": [33, 47, 48]}, "three even numbers"),
        ({"axes_dims": [32, 48, 64]}, "add up to 128"),
    ],
)
def test_what_it_does_not_have_is_refused_in_one_line(options: dict[str, object], reason: str, tmp_path: Path) -> None:
    published = json.loads((PUBLISHED / "z_image" / "transformer" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert read_config(tmp_path).depth == 30
    assert_config_refused(read_config, tmp_path, published | options, reason)


def test_options_left_out_are_diffusers_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "ZImageTransformer2DModel"}')
    assert read_config(tmp_path) == read_config(PUBLISHED / "z_image" / "transformer")
