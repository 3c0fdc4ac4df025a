"""The native network computes what diffusers' QwenImageTransformer2DModel computes, from the same weights."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor

from models.attention import BACKENDS
from models.checkpoint_source import CheckpointSource
from models.components import Conditioning
from models.qwen_image import NAMES, PLAN, QwenImage, load_denoiser, read_config
from models.registry import PUBLISHED
from tests.fixtures.models.parity import assert_config_refused, assert_names_map, assert_plan_fits, randomize, rel_l2

SMALL = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
CONFIGS = {
    "small": SMALL,
    "one block, other axes": SMALL | {"num_layers": 1, "axes_dims_rope": (8, 2, 6), "num_attention_heads": 2},
    "sixteen channels": SMALL
    | {"in_channels": 64, "out_channels": 16, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)},
    "told of clean pictures": SMALL | {"zero_cond_t": True},
}
SIZES = ((8, 8), (6, 14), (10, 2), (2, 4))
TOKENS = 7


def their(options: dict[str, object]) -> QwenImageTransformer2DModel:
    """Make diffusers' network with random weights everywhere."""
    network = QwenImageTransformer2DModel(**options).eval()
    randomize(network)
    return network


def our(theirs: QwenImageTransformer2DModel, folder: Path, backend: str = "sdpa") -> QwenImage:
    theirs.save_pretrained(folder / "transformer")
    return load_denoiser(CheckpointSource(folder), BACKENDS[backend])


def inputs(network: QwenImage, batch: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a latent, times, text states, and a mask that hides another number of tokens of each prompt."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, network.config.latent_channels, height, width, generator=generator)
    text = torch.randn(batch, TOKENS, network.config.text_channels, generator=generator)
    mask = torch.arange(TOKENS)[None] < torch.tensor([3, TOKENS, 1])[:batch, None]
    return latent, torch.tensor([0.7, 333.25, 999.0])[:batch], text, mask


def predict(
    theirs: QwenImageTransformer2DModel, latent: Tensor, tau: Tensor, text: Tensor, mask: Tensor | None
) -> Tensor:
    """Call diffusers' network, with latents packed and unpacked as its pipeline does."""
    batch, channels, height, width = latent.shape
    packed = QwenImagePipeline._pack_latents(latent, batch, channels, height, width)
    shapes = [[(1, height // 2, width // 2)]] * batch
    output = theirs(packed, text, mask, tau / 1000, shapes, return_dict=False)[0]
    return QwenImagePipeline._unpack_latents(output, 8 * height, 8 * width, 8)[:, :, 0]


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_parity_with_diffusers(name: str, batch: int, masked: bool, backend: str, tmp_path: Path) -> None:
    theirs = their(CONFIGS[name])
    ours = our(theirs, tmp_path, backend)
    for height, width in SIZES:
        latent, tau, text, mask = inputs(ours, batch, height, width)
        key_mask = mask if masked else None
        with torch.no_grad():
            expected = predict(theirs, latent, tau, text, key_mask)
            assert rel_l2(ours(latent, tau, Conditioning(text, key_mask)), expected) < 1e-5, (height, width)


def test_large_images_and_late_text_have_diffusers_positions(tmp_path: Path) -> None:
    """Odd numbers of rows and columns (83 at 1328 pixels) are counted from the middle, the text from behind them."""
    theirs = their(SMALL | {"num_layers": 1})
    ours = our(theirs, tmp_path)
    latent, tau, _, _ = inputs(ours, 1, 2 * 83, 6)
    text = torch.randn(1, 300, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert rel_l2(ours(latent, tau, Conditioning(text)), predict(theirs, latent, tau, text, None)) < 1e-5


def test_every_input_matters(tmp_path: Path) -> None:
    """Parity proves nothing where the output does not depend on what is compared."""
    network = our(their(SMALL), tmp_path)
    latent, tau, text, mask = inputs(network, 3, 8, 8)
    other = torch.randn(text.shape, generator=torch.Generator().manual_seed(2))
    hidden = torch.where(mask[..., None], text, other)
    seen = torch.where(mask[..., None], other, text)
    with torch.no_grad():
        plain = network(latent, tau, Conditioning(text, mask))
        assert rel_l2(network(latent, tau + 100, Conditioning(text, mask)), plain) > 0.01
        assert rel_l2(network(latent, tau, Conditioning(seen, mask)), plain) > 0.01
        assert rel_l2(network(latent, tau, Conditioning(text)), plain) > 0.001
        assert torch.equal(network(latent, tau, Conditioning(hidden, mask)), plain)
        shifted = network(latent.roll(2, dims=-1), tau, Conditioning(text, mask)).roll(-2, dims=-1)
        assert rel_l2(shifted, plain) > 0.001  # positions
        swapped = network(latent, tau, Conditioning(text.flip(1), mask.flip(1)))
        assert rel_l2(swapped, plain) > 0.001  # the text's too
        with pytest.raises(ValueError, match="prompt embeddings"):
            network(latent, tau, Conditioning())


def test_a_batch_equals_its_single_images(tmp_path: Path) -> None:
    network = our(their(SMALL), tmp_path)
    latent, tau, text, mask = inputs(network, 3, 6, 10)
    with torch.no_grad():
        together = network(latent, tau, Conditioning(text, mask))
        for k in range(3):
            alone = Conditioning(text[k : k + 1, : mask[k].sum()])
            assert rel_l2(network(latent[k : k + 1], tau[k : k + 1], alone)[0], together[k]) < 1e-6


def test_bfloat16_stays_near(tmp_path: Path) -> None:
    """The output is as near to float32 as that of diffusers' network in bfloat16, whose time is rounded too."""
    theirs = their(SMALL)
    ours = our(theirs, tmp_path)
    latent, tau, text, mask = inputs(ours, 3, 6, 14)
    with torch.no_grad():
        exact = ours(latent, tau, Conditioning(text, mask))
        low, low_text = latent.bfloat16(), text.bfloat16()
        output = ours.bfloat16()(low, tau, Conditioning(low_text, mask))
        peer = predict(theirs.bfloat16(), low, tau, low_text, mask)
    assert output.dtype == torch.bfloat16
    assert rel_l2(output.float(), exact) < min(0.03, 1.2 * rel_l2(peer.float(), exact))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_names_map_one_to_one_and_the_plan_fits(name: str, tmp_path: Path) -> None:
    theirs = their(CONFIGS[name])
    ours = our(theirs, tmp_path)
    assert_names_map(ours, theirs.state_dict(), NAMES)
    assert_plan_fits(ours, PLAN)


def test_names_of_the_published_network_map_one_to_one() -> None:
    folder = PUBLISHED / "qwen_image" / "transformer"
    with torch.device("meta"):
        theirs = QwenImageTransformer2DModel.from_config(QwenImageTransformer2DModel.load_config(folder))
        ours = QwenImage(read_config(folder))
    assert_names_map(ours, theirs.state_dict(), NAMES)
    assert_plan_fits(ours, PLAN)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 20_430_401_088


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "this network loads QwenImageTransformer2DModel"),
        ({"guidance_embeds": True}, "guidance-distilled"),
        ({"use_additional_t_cond": True}, "Qwen-Image-Layered"),
        ({"use_layer3d_rope": True}, "Qwen-Image-Layered"),
        ({"num_layers": "many"}, "no whole number under num_layers"),
        ({"out_channels": None}, "no whole number under out_channels"),
        ({"patch_size": 1}, "packs 2 x 2"),
        ({"in_channels": 68}, "do not go together"),
        ({"axes_dims_rope": [16, 56]}, "three even numbers"),
        ({"axes_dims_rope": [16, 56, 40]}, "add up to 128"),
        ({"axes_dims_rope": [16, 55, 57]}, "three even numbers"),
    ],
)
def test_what_it_does_not_have_is_refused_in_one_line(options: dict[str, object], reason: str, tmp_path: Path) -> None:
    published = json.loads((PUBLISHED / "qwen_image" / "transformer" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert read_config(tmp_path).depth == 60
    assert_config_refused(read_config, tmp_path, published | options, reason)


def test_options_left_out_are_diffusers_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "QwenImageTransformer2DModel"}')
    assert read_config(tmp_path) == read_config(PUBLISHED / "qwen_image" / "transformer")
