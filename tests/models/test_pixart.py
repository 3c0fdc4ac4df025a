"""The native DiT computes what diffusers' PixArtTransformer2DModel computes, from the same weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from models.attention import BACKENDS
from models.checkpoint_source import CheckpointSource
from models.components import Conditioning
from models.configs.pixart import config_json
from models.files import CheckpointError
from models.layers import sincos_table_2d
from models.pixart import NAMES, PixArt, PixArtConfig, load_denoiser, read_config
from models.pixart.weights import PLAN
from models.registry import REFERENCE
from tests.fixtures.models.parity import assert_config_refused, assert_names_map, assert_plan_fits, randomize, rel_l2

SMALL = PixArtConfig(depth=2, heads=4, head_channels=8, in_channels=4, out_channels=4, sample_size=8, text_channels=24)
CONFIGS = {
    "small": SMALL,
    "learned variance": PixArtConfig(2, 2, 16, 4, 8, 2, 16, 24),
    "patch 1, odd base": PixArtConfig(1, 3, 12, 3, 3, 1, 7, 10),
    "patch 4": PixArtConfig(1, 2, 8, 4, 4, 4, 16, 8),
    "scaled positions": PixArtConfig(1, 2, 8, 4, 4, 2, 8, 8, position_scale=2.0),
    "positions of 256 pixels": PixArtConfig(1, 2, 8, 4, 4, 2, 8, 8, position_scale=0.5),
    "told its size": PixArtConfig(2, 2, 12, 4, 8, 2, 16, 24, size_conditioning=True),
    "told its size, another stride": PixArtConfig(1, 3, 8, 4, 8, 2, 16, 24, size_conditioning=True, stride=2),
    "another epsilon": PixArtConfig(1, 2, 8, 4, 4, 2, 8, 8, norm_eps=0.1),
}


def their(config: PixArtConfig) -> PixArtTransformer2DModel:
    """Make diffusers' network with random weights everywhere, biases and tables too."""
    network = PixArtTransformer2DModel.from_config(config_json(config)).eval()
    randomize(network)
    return network


def our(theirs: PixArtTransformer2DModel, config: PixArtConfig, backend: str = "sdpa") -> PixArt:
    network = PixArt(config, BACKENDS[backend])
    network.load_state_dict({NAMES.to_native(name): tensor for name, tensor in theirs.state_dict().items()})
    return network.eval()


def inputs(config: PixArtConfig, batch: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a latent, times, text states, and a mask that hides another number of tokens of each prompt."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, config.in_channels, height, width, generator=generator)
    text = torch.randn(batch, 7, config.text_channels, generator=generator)
    mask = torch.arange(7)[None] < torch.tensor([3, 7, 1])[:batch, None]
    return latent, torch.tensor([0.7, 333.25, 999.0])[:batch], text, mask


def size_arguments(config: PixArtConfig, latent: Tensor) -> dict[str, Tensor | None]:
    """Return the image's size in pixels as diffusers' pipeline passes it."""
    if not config.size_conditioning:
        return {"resolution": None, "aspect_ratio": None}
    height, width = (float(side * config.stride) for side in latent.shape[-2:])
    row = torch.ones(len(latent), 1)
    return {"resolution": row * torch.tensor([height, width]), "aspect_ratio": row * (height / width)}


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_parity_with_diffusers(name: str, batch: int, masked: bool, backend: str) -> None:
    config = CONFIGS[name]
    theirs = their(config)
    ours = our(theirs, config, backend)
    side = config.sample_size
    for height, width in ((side, side), (2 * side, side), (side, 3 * config.patch), (side + config.patch, side)):
        latent, tau, text, mask = inputs(config, batch, height, width)
        with torch.no_grad():
            output = ours(latent, tau, Conditioning(text, mask if masked else None))
            expected = theirs(
                latent,
                encoder_hidden_states=text,
                encoder_attention_mask=mask if masked else None,
                timestep=tau,
                added_cond_kwargs=size_arguments(config, latent),
            ).sample
        assert rel_l2(output, expected) < 1e-5, (height, width)


def test_every_input_matters() -> None:
    """Parity proves nothing where the output does not depend on what is compared."""
    network = our(their(SMALL), SMALL)
    latent, tau, text, mask = inputs(SMALL, 3, 8, 8)
    other = torch.randn(text.shape, generator=torch.Generator().manual_seed(2))
    hidden = torch.where(mask[..., None], text, other)
    seen = torch.where(mask[..., None], other, text)
    with torch.no_grad():
        plain = network(latent, tau, Conditioning(text, mask))
        assert rel_l2(network(latent, tau + 100, Conditioning(text, mask)), plain) > 0.01
        assert rel_l2(network(latent, tau, Conditioning(seen, mask)), plain) > 0.01
        assert rel_l2(network(latent, tau, Conditioning(text)), plain) > 0.001
        assert torch.equal(network(latent, tau, Conditioning(hidden, mask)), plain)
        shifted = latent.roll(2, dims=-1)
        assert rel_l2(network(shifted, tau, Conditioning(text, mask)).roll(-2, dims=-1), plain) > 0.001  # positions


def test_a_batch_equals_its_single_images() -> None:
    network = our(their(SMALL), SMALL)
    latent, tau, text, mask = inputs(SMALL, 3, 8, 8)
    with torch.no_grad():
        together = network(latent, tau, Conditioning(text, mask))
        for k in range(3):
            alone = network(latent[k : k + 1], tau[k : k + 1], Conditioning(text[k : k + 1], mask[k : k + 1]))
            assert rel_l2(alone[0], together[k]) < 1e-6


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_names_are_a_bijection(name: str) -> None:
    config = CONFIGS[name]
    network = PixArt(config)
    assert_names_map(network, their(config).state_dict(), NAMES)
    assert_plan_fits(network, PLAN)


def test_the_network_sees_its_size() -> None:
    """The same latent with the size of a larger image gives another output; wide differs from tall."""
    config = CONFIGS["told its size"]
    network = our(their(config), config)
    latent, tau, text, mask = inputs(config, 1, 16, 16)
    other = PixArt(replace(config, stride=16))
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        plain = network(latent, tau, Conditioning(text, mask))
        assert rel_l2(other(latent, tau, Conditioning(text, mask)), plain) > 0.01
        assert rel_l2(network.size(128, 64, tau), network.size(64, 128, tau)) > 0.1


def test_no_name_is_part_of_another_pair() -> None:
    assert len({theirs for theirs, _ in NAMES.pairs}) == len({ours for _, ours in NAMES.pairs}) == len(NAMES.pairs)


def test_sizes_come_back_from_the_config(tmp_path: Path) -> None:
    for config in CONFIGS.values():
        (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
        assert replace(read_config(tmp_path), stride=config.stride) == config
        assert their(config).config.num_layers == config.depth


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_class_name": "DiTTransformer2DModel"}, "loads PixArtTransformer2DModel"),
        ({"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}, "norm_type=ada_norm_zero is not"),
        ({"_class_name": "Transformer2DModel", "norm_type": None}, "no norm_type"),
        ({"use_additional_conditions": True}, "a width that 3 divides, not 32"),
        ({"num_layers": None}, "num_layers"),
        ({"num_layers": "many"}, "num_layers"),
        ({"out_channels": 5}, "out_channels=5"),
        ({"cross_attention_dim": 64}, "cross_attention_dim=64 is not supported; only cross_attention_dim=32"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        ({"activation_fn": "geglu", "attention_bias": False}, "activation_fn=geglu, attention_bias=False is not"),
        ({"attention_type": "gated"}, "attention_type=gated"),
    ],
)
def test_a_config_of_another_network_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    raw = {key: value for key, value in (config_json(SMALL) | change).items() if value is not None}
    assert_config_refused(read_config, tmp_path, raw, says)


def test_large_checkpoints_scale_their_positions_by_default(tmp_path: Path) -> None:
    """diffusers' rule for a config without interpolation_scale: sample_size // 64, at least 1."""
    for sample_size, scale in ((16, 1.0), (64, 1.0), (128, 2.0), (256, 4.0)):
        raw = config_json(PixArtConfig(1, 2, 8, 4, 4, 2, sample_size, 8)) | {"interpolation_scale": None}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        config = read_config(tmp_path)
        assert config.position_scale == scale
        theirs = PixArtTransformer2DModel.from_config(raw)
        base = config.sample_size // config.patch
        ours = sincos_table_2d(base, base, config.width, base, config.position_scale)
        torch.testing.assert_close(ours, theirs.pos_embed.pos_embed[0], rtol=0, atol=1e-6)


def test_older_files_name_another_class_and_say_nothing_of_sizes(tmp_path: Path) -> None:
    """diffusers' rule without use_additional_conditions: at a sample size of 128 the network gets sizes."""
    config = PixArtConfig(1, 2, 12, 4, 8, 2, 128, 8, position_scale=2.0)
    for sample_size, size_conditioning in ((128, True), (64, False), (256, False)):
        raw = config_json(config) | {"_class_name": "Transformer2DModel", "sample_size": sample_size}
        del raw["use_additional_conditions"]
        (tmp_path / "config.json").write_text(json.dumps(raw))
        found = read_config(tmp_path)
        assert found.size_conditioning is size_conditioning
        assert_names_map(PixArt(found), PixArtTransformer2DModel.from_config(raw).state_dict(), NAMES)


def test_a_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a readable JSON file"):
        read_config(tmp_path)
    for text in ("<html>", "[]", "3"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="JSON"):
            read_config(tmp_path)


def test_a_checkpoint_that_diffusers_wrote_loads(tmp_path: Path) -> None:
    theirs = their(SMALL)
    theirs.save_pretrained(tmp_path)
    ours = load_denoiser(CheckpointSource(tmp_path.parent, tmp_path.name))
    latent, tau, text, mask = inputs(SMALL, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(
            ours(latent, tau, Conditioning(text, mask)), our(theirs, SMALL)(latent, tau, Conditioning(text, mask))
        )
    assert not ours.training


def test_all_mismatches_come_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(SMALL)))
    tensors = {NAMES.to_published(key): value for key, value in PixArt(SMALL).state_dict().items()}
    del tensors["proj_out.weight"]
    tensors["stranger"] = torch.zeros(1)
    tensors["proj_out.bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_denoiser(CheckpointSource(tmp_path.parent, tmp_path.name))
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path) in message
    assert "missing project_out.weight" in message
    assert "unexpected stranger" in message
    assert "project_out.bias is (3,), the network has (16,)" in message


def test_many_mismatches_are_counted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(SMALL)))
    save_file({"stranger": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=rf"and {len(PixArt(SMALL).state_dict()) + 1 - 6} more"):
        load_denoiser(CheckpointSource(tmp_path.parent, tmp_path.name))


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    network = PixArt(SMALL)
    (tmp_path / "config.json").write_text(json.dumps(config_json(SMALL)))
    tensors = {NAMES.to_published(key): value for key, value in network.state_dict().items()}
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_denoiser(CheckpointSource(tmp_path.parent, tmp_path.name)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in network.state_dict().items())


def test_the_shipped_network_agrees_with_diffusers() -> None:
    folder = REFERENCE / "emoji" / "transformer"
    theirs = PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False).eval()
    ours = load_denoiser(CheckpointSource(REFERENCE / "emoji"))
    latent, tau, text, mask = inputs(ours.config, 1, 16, 16)
    with torch.no_grad():
        expected = theirs(
            latent,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=tau,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        output = ours(latent, tau, Conditioning(text, mask))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
