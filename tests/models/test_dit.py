"""The native DiT computes what diffusers' DiTTransformer2DModel computes, from the same weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from models.attention import BACKENDS
from models.checkpoint_source import CheckpointSource
from models.components import Conditioning
from models.dit import NAMES, PLAN, DiT, DiTConfig, load_denoiser, read_config
from models.dit.prompts import ClassLabels
from models.files import CheckpointError, read_json
from models.layers import unpatchify
from models.prompt_rules import read_names
from models.registry import PUBLISHED
from tests.fixtures.models.parity import assert_config_refused, assert_names_map, assert_plan_fits, randomize, rel_l2

SMALL = DiTConfig(
    depth=2, heads=4, head_channels=8, in_channels=4, out_channels=8, patch=2, sample_size=8, classes=10, norm_eps=1e-5
)
CONFIGS = {
    "small": SMALL,
    "no variance": replace(SMALL, out_channels=4, depth=1),
    "patch 1, odd base": DiTConfig(1, 3, 12, 3, 6, 1, 7, 5),
    "patch 4": DiTConfig(1, 2, 8, 4, 8, 4, 16, 3),
    "another epsilon": replace(SMALL, norm_eps=0.1),
}


def config_json(config: DiTConfig) -> dict[str, Any]:
    """Return the config.json that makes diffusers build the same network."""
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_layers": config.depth,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_channels,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "patch_size": config.patch,
        "sample_size": config.sample_size,
        "num_embeds_ada_norm": config.classes,
        "norm_type": "ada_norm_zero",
        "norm_eps": config.norm_eps,
    }


def their(config: DiTConfig) -> DiTTransformer2DModel:
    """Make diffusers' network with random weights; the blocks' classes and times differ from one another too."""
    network = DiTTransformer2DModel.from_config(config_json(config)).eval()
    randomize(network)
    for block in network.transformer_blocks:  # rows of a table: as large as the times that they are added to
        block.norm1.emb.class_embedder.embedding_table.weight.data.mul_(config.width**0.5)
    return network


def our(theirs: DiTTransformer2DModel, config: DiTConfig, backend: str = "sdpa") -> DiT:
    network = DiT(config, BACKENDS[backend])
    network.load_state_dict({NAMES.to_native(name): tensor for name, tensor in theirs.state_dict().items()})
    return network.eval()


def inputs(config: DiTConfig, batch: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a latent, times, and classes with the null class among them."""
    latent = torch.randn(batch, config.in_channels, height, width, generator=torch.Generator().manual_seed(1))
    return latent, torch.tensor([0.7, 333.25, 999.0])[:batch], torch.tensor([2, config.classes, 0])[:batch]


def their_output(network: DiTTransformer2DModel, latent: Tensor, tau: Tensor, labels: Tensor, patch: int) -> Tensor:
    """Return diffusers' output; it arranges tokens as a square whatever the latent's shape, so restore the order."""
    square = network(latent, timestep=tau, class_labels=labels).sample
    side = square.shape[-1] // patch
    tokens = square.unflatten(-1, (side, patch)).unflatten(-3, (side, patch)).permute(0, 2, 4, 3, 5, 1)
    height, width = (length // patch for length in latent.shape[-2:])
    return unpatchify(tokens.reshape(len(latent), side * side, -1), height, width, patch)


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_parity_with_diffusers(name: str, batch: int, backend: str) -> None:
    config, patch = CONFIGS[name], CONFIGS[name].patch
    theirs = their(config)
    ours = our(theirs, config, backend)
    side = config.sample_size
    for height, width in ((side, side), (3 * patch, 3 * patch), (2 * patch, 8 * patch), (9 * patch, 4 * patch)):
        latent, tau, labels = inputs(config, batch, height, width)
        with torch.no_grad():
            output = ours(latent, tau, Conditioning(labels=labels))
            if height == width:
                assert rel_l2(output, theirs(latent, timestep=tau, class_labels=labels).sample) < 1e-5
            assert rel_l2(output, their_output(theirs, latent, tau, labels, patch)) < 1e-5, (height, width)


def test_every_input_matters() -> None:
    """Parity proves nothing where the output does not depend on what is compared."""
    network = our(their(SMALL), SMALL)
    latent, tau, labels = inputs(SMALL, 3, 8, 8)
    with torch.no_grad():
        plain = network(latent, tau, Conditioning(labels=labels))
        assert rel_l2(network(latent, tau + 100, Conditioning(labels=labels)), plain) > 0.01
        assert rel_l2(network(latent, tau, Conditioning(labels=labels.roll(1))), plain) > 0.01
        assert rel_l2(network(latent.flip(1), tau, Conditioning(labels=labels)), plain) > 0.01
        shifted = latent.roll(2, dims=-1)
        assert rel_l2(network(shifted, tau, Conditioning(labels=labels)).roll(-2, dims=-1), plain) > 0.001  # positions
        with pytest.raises(ValueError, match="needs class labels"):
            network(latent, tau, Conditioning())


def test_every_weight_matters() -> None:
    """The inputs that only one block or only the head reads count too."""
    network = our(their(SMALL), SMALL)
    latent, tau, labels = inputs(SMALL, 1, 8, 8)
    with torch.no_grad():
        plain = network(latent, tau, Conditioning(labels=labels))
        for name, parameter in network.named_parameters():
            if name.endswith("to_k.bias"):
                continue  # the same score for every key: softmax does not change
            kept = parameter.clone()
            parameter.mul_(1.5)
            assert rel_l2(network(latent, tau, Conditioning(labels=labels)), plain) > 1e-4, name
            parameter.copy_(kept)


def test_a_batch_equals_its_single_images() -> None:
    network = our(their(SMALL), SMALL)
    latent, tau, labels = inputs(SMALL, 3, 8, 8)
    with torch.no_grad():
        together = network(latent, tau, Conditioning(labels=labels))
        for k in range(3):
            alone = network(latent[k : k + 1], tau[k : k + 1], Conditioning(labels=labels[k : k + 1]))
            assert rel_l2(alone[0], together[k]) < 1e-6


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_names_are_a_bijection(name: str) -> None:
    network = DiT(CONFIGS[name])
    assert_names_map(network, their(CONFIGS[name]).state_dict(), NAMES)
    assert_plan_fits(network, PLAN)


def test_a_checkpoint_that_diffusers_wrote_loads(tmp_path: Path) -> None:
    theirs = their(SMALL)
    theirs.save_pretrained(tmp_path / "transformer")
    ours = load_denoiser(CheckpointSource(tmp_path))
    assert ours.config == SMALL
    latent, tau, labels = inputs(SMALL, 3, 8, 8)
    with torch.no_grad():
        expected = theirs(latent, timestep=tau, class_labels=labels).sample
        assert rel_l2(ours(latent, tau, Conditioning(labels=labels)), expected) < 1e-5
    assert not ours.training


def write(folder: Path, raw: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def test_sizes_come_back_from_the_config(tmp_path: Path) -> None:
    for config in CONFIGS.values():
        write(tmp_path, config_json(config))
        assert read_config(tmp_path) == config
        write(tmp_path, config_json(config) | {"_class_name": "Transformer2DModel"})
        assert read_config(tmp_path) == config
    write(tmp_path, config_json(SMALL) | {"out_channels": None, "norm_eps": None})  # diffusers' defaults
    assert read_config(tmp_path) == replace(SMALL, out_channels=4, norm_eps=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_class_name": "PixArtTransformer2DModel"}, "loads DiTTransformer2DModel or Transformer2DModel"),
        ({"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}, "norm_type=ada_norm_single is not"),
        ({"_class_name": "Transformer2DModel", "norm_type": "layer_norm"}, "norm_type=layer_norm is not"),
        ({"_class_name": "Transformer2DModel", "norm_type": None}, "no norm_type"),
        ({"num_layers": None}, "num_layers"),
        ({"num_embeds_ada_norm": "many"}, "num_embeds_ada_norm"),
        ({"out_channels": 5}, "out_channels=5"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True is not supported"),
        ({"activation_fn": "geglu"}, "activation_fn=geglu is not supported; only activation_fn=gelu-approximate"),
        ({"attention_bias": False}, "attention_bias=False is not supported"),
    ],
)
def test_a_config_of_another_network_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    raw = {key: value for key, value in (config_json(SMALL) | change).items() if value is not None}
    assert_config_refused(read_config, tmp_path, raw, says)


def test_a_prompt_is_the_name_or_the_number_of_a_class() -> None:
    labels = ClassLabels(read_names({"id2label": {"0": "tench, Tinca tinca", "1": "7", "2": "crane", "3": "crane"}}), 9)
    assert labels(["Tinca tinca", "tench", " tench ", "4", "7", "", "crane"]).labels.tolist() == [0, 0, 0, 4, 1, 9, 3]
    assert labels([""], negative=True).labels.dtype == torch.int64
    for prompt, says in {
        "trench": "'trench' is not a class; did you mean tench.* a number from 0 to 8",
        "9": "'9' is not a class",
        "-1": "'-1' is not a class",
        "zebra crossing": r"not a class \(give a name",
    }.items():
        with pytest.raises(ValueError, match=says):
            labels.check(prompt)
        with pytest.raises(ValueError, match="is not a class"):
            labels.count(prompt)


def test_a_checkpoint_without_names_takes_numbers() -> None:
    labels = ClassLabels(read_names({}), 3)
    assert labels(["2", ""]).labels.tolist() == [2, 3]
    with pytest.raises(ValueError, match="the checkpoint has no class names"):
        labels.check("tench")
    with pytest.raises(CheckpointError, match="not an object"):
        read_names({"id2label": ["tench"]})
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_names({"id2label": {"0": 3}})


@pytest.mark.parametrize("name", ["dit_256", "dit_512"])
def test_the_published_names_are_those_of_imagenet(name: str) -> None:
    index = read_json(PUBLISHED / name / "model_index.json")
    names = read_names(index)
    assert list(index["id2label"]) == [str(number) for number in range(1000)]
    assert set(range(1000)) - set(names.values()) == {
        134,
        638,
        657,
    }  # crane, maillot, missile: a later class has the name too
    known = {"white shark": 2, "umbrella": 879, "golden retriever": 207, "crane": 517, "Cardigan": 264, "cardigan": 474}
    assert {prompt: names[prompt] for prompt in known} == known


def test_published_sizes() -> None:
    """DiT-XL/2 of the paper's table 1: 28 layers, width 1152, 16 heads, patches of 2; 256 or 512 pixels."""
    for name, side in (("dit_256", 32), ("dit_512", 64)):
        assert read_config(PUBLISHED / name / "transformer") == DiTConfig(28, 16, 72, 4, 8, 2, side, 1000, 1e-5)
