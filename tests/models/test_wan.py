"""The native Wan computes what diffusers' WanTransformer3DModel computes, from the same weights."""

import json
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.pipelines.wan import pipeline_wan
from torch import Tensor

from models.attention import BACKENDS
from models.checkpoint_source import CheckpointSource
from models.components import Conditioning, LatentSpace
from models.files import CheckpointError
from models.registry import PUBLISHED
from models.wan import NAMES, PLAN, Wan, load_denoiser, read_config
from models.wan.components import load
from models.wan.decoder import load_wan_decoder
from models.wan.prompts import clean
from models.wan.weights import KEEP_FLOAT32
from tests.fixtures.models.parity import assert_config_refused, assert_names_map, assert_plan_fits, randomize, rel_l2

SMALL: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 3,
    "attention_head_dim": 14,  # 6 channels for the frame, 4 for the row, 4 for the column
    "in_channels": 5,
    "out_channels": 5,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 50,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 24,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "no cross norm": SMALL | {"cross_attn_norm": False, "num_layers": 1},
    "patch 1": SMALL | {"patch_size": [1, 1, 1], "num_layers": 1},
    "large eps": SMALL | {"eps": 0.05, "num_attention_heads": 1},
    "out_channels of in_channels": SMALL | {"out_channels": None, "attention_head_dim": 24},
}
VIDEOS = ((1, 2, 2), (3, 6, 10), (2, 12, 4))  # latent frames, rows, columns
PROMPTS_AS_WRITTEN = (
    "  a red\tfox \n\n in   the snow ",
    "rock &amp;amp; roll &lt;3 &quot;live&quot;",
    "schÃ¶n, “quoted”, ﬁne",
    "色调艳丽\uff0c过曝\uff0c静态",  # full-width commas, as in the published negative prompt
    "".join(chr(code) for code in range(1, 0x3001) if not 0xD800 <= code < 0xE000),
    "",
)


def their(config: dict[str, Any], folder: Path) -> WanTransformer3DModel:
    """Make diffusers' network with random weights everywhere, and save its checkpoint as `folder`/transformer."""
    network = WanTransformer3DModel(**config).eval()
    randomize(network)
    network.save_pretrained(folder / "transformer")
    return network


def inputs(config: dict[str, Any], batch: int, video: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a latent, times, and text states that end in zeros after another number of tokens of each prompt."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, config["in_channels"], *video, generator=generator)
    text = torch.randn(batch, 7, config["text_dim"], generator=generator)
    ends = torch.tensor([3, 7, 1])[:batch, None]
    text = torch.where((torch.arange(7) < ends)[..., None], text, 0.0)
    return latent, torch.tensor([0.7, 333.0, 999.0])[:batch], text


@pytest.mark.parametrize("name", list(CONFIGS))
def test_parity_with_diffusers(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    theirs = their(config, tmp_path)
    for kernel in BACKENDS.values():
        ours = load_denoiser(CheckpointSource(tmp_path), kernel)
        for video in VIDEOS:
            for batch in (1, 3):
                latent, tau, text = inputs(config, batch, video)
                with torch.no_grad():
                    expected = theirs(latent, timestep=tau, encoder_hidden_states=text, return_dict=False)[0]
                    output = ours(latent, tau, Conditioning(text))
                assert rel_l2(output, expected) < 1e-5, (kernel, video, batch)


def test_bfloat16_keeps_in_float32_what_diffusers_keeps(tmp_path: Path) -> None:
    theirs = their(SMALL, tmp_path)
    for name, parameter in theirs.named_parameters():  # from_pretrained does this, but needs accelerate for it
        if not set(WanTransformer3DModel._keep_in_fp32_modules) & set(name.split(".")):
            parameter.data = parameter.data.bfloat16()
    ours = load_denoiser(CheckpointSource(tmp_path, dtype=torch.bfloat16))
    kept = {NAMES.to_native(name) for name, tensor in theirs.state_dict().items() if tensor.dtype is torch.float32}
    assert kept == {name for name, tensor in ours.state_dict().items() if tensor.dtype is torch.float32}
    assert len(kept) == 4 + 3 + 4  # time embedder, tables, norms
    latent, tau, text = inputs(SMALL, 3, VIDEOS[1])
    latent, text = latent.bfloat16(), text.bfloat16()
    with torch.no_grad():
        expected = theirs(latent, timestep=tau, encoder_hidden_states=text, return_dict=False)[0]
        output = ours(latent, tau, Conditioning(text))
        wide = load_denoiser(CheckpointSource(tmp_path))(latent.float(), tau, Conditioning(text.float()))
    assert output.dtype is torch.bfloat16
    apart = rel_l2(expected.float(), wide)
    assert rel_l2(output.float(), expected.float()) < apart / 5  # the same roundings, not only the same precision


def test_every_input_matters(tmp_path: Path) -> None:
    """Parity proves nothing where the output does not depend on what is compared."""
    their(SMALL, tmp_path)
    network = load_denoiser(CheckpointSource(tmp_path))
    latent, tau, text = inputs(SMALL, 3, (3, 6, 10))
    with torch.no_grad():
        plain = network(latent, tau, Conditioning(text))
        assert rel_l2(network(latent, tau + 100, Conditioning(text)), plain) > 0.01
        assert rel_l2(network(latent, tau, Conditioning(text.flip(0))), plain) > 0.01
        shorter = Conditioning(text[:, :-1])  # zeros are tokens too
        assert rel_l2(network(latent[:1], tau[:1], Conditioning(text[:1, :-1])), plain[:1]) > 1e-4
        assert rel_l2(network(latent, tau, shorter), plain) > 1e-4
        for axis, shift in ((2, 1), (3, 2), (4, 2)):  # positions
            moved = network(latent.roll(shift, axis), tau, Conditioning(text)).roll(-shift, axis)
            assert rel_l2(moved, plain) > 0.001, axis


def test_a_batch_is_its_videos(tmp_path: Path) -> None:
    their(SMALL, tmp_path)
    network = load_denoiser(CheckpointSource(tmp_path))
    latent, tau, text = inputs(SMALL, 3, (3, 6, 10))
    with torch.no_grad():
        together = network(latent, tau, Conditioning(text))
        for k in range(3):
            alone = network(latent[k : k + 1], tau[k : k + 1], Conditioning(text[k : k + 1]))
            assert rel_l2(alone[0], together[k]) < 1e-6


def test_what_the_network_cannot_take_is_refused(tmp_path: Path) -> None:
    their(SMALL, tmp_path)
    network = load_denoiser(CheckpointSource(tmp_path))
    latent, tau, text = inputs(SMALL, 1, (1, 2, 2))
    with pytest.raises(ValueError, match="padded with zeros, not a mask"):
        network(latent, tau, Conditioning(text, torch.ones(1, 7, dtype=torch.bool)))
    with pytest.raises(ValueError, match="needs prompt embeddings"):
        network(latent, tau, Conditioning())
    network(latent.expand(-1, -1, 24, -1, -1), tau, Conditioning(text))
    for long in (latent.expand(-1, -1, 25, -1, -1), latent.repeat(1, 1, 1, 1, 25)):
        with pytest.raises(ValueError, match="positions for 24 per side"):
            network(long, tau, Conditioning(text))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_names_map_one_to_one(tmp_path: Path, name: str) -> None:
    theirs = their(CONFIGS[name], tmp_path)
    network = Wan(read_config(tmp_path / "transformer"))
    assert_names_map(network, theirs.state_dict(), NAMES)
    assert_plan_fits(network, PLAN)


@pytest.mark.parametrize(("name", "parameters"), [("wan_1_3b", 1_418_996_800), ("wan_14b", 14_288_491_584)])
def test_the_published_network_has_diffusers_names_and_shapes(name: str, parameters: int) -> None:
    raw = json.loads((PUBLISHED / name / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        theirs = WanTransformer3DModel.from_config(raw)
    ours = load_denoiser(
        CheckpointSource(PUBLISHED / name, dummy=True, device=torch.device("meta"), dtype=torch.bfloat16)
    )
    assert_names_map(ours, theirs.state_dict(), NAMES)
    assert_plan_fits(ours, PLAN)
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters
    wide = [name for name, tensor in ours.state_dict().items() if tensor.dtype is torch.float32]
    assert len(wide) == 4 + 1 + 3 * len(ours.blocks)


def test_every_pattern_of_what_stays_wide_finds_a_parameter(tmp_path: Path) -> None:
    their(SMALL, tmp_path)
    names = [name for name, _ in Wan(read_config(tmp_path / "transformer")).named_parameters()]
    assert all(any(fnmatch(name, pattern) for name in names) for pattern in KEEP_FLOAT32)


def test_what_a_config_leaves_out_is_diffusers_default(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    ours = read_config(tmp_path)
    with torch.device("meta"):
        theirs, network = WanTransformer3DModel(), Wan(ours)
    assert_names_map(network, theirs.state_dict(), NAMES)
    assert ours.eps == theirs.config.eps
    assert ours.max_positions == theirs.config.rope_max_seq_len
    assert ours.heads == theirs.config.num_attention_heads


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_class_name": "WanVACETransformer3DModel"}, "loads WanTransformer3DModel"),
        ({"image_dim": 1280}, "image_dim belongs to image-to-video"),
        ({"added_kv_proj_dim": 5120}, "added_kv_proj_dim belongs to image-to-video"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len belongs to image-to-video"),
        ({"in_channels": 36}, "reads more than a noisy latent"),
        ({"qk_norm": None}, "qk_norm=None is not supported"),
        ({"patch_size": [2, 2, 2]}, r"patch_size=\[2, 2, 2\] is not supported"),
        ({"patch_size": [1, 2, 4]}, "is not supported"),
        ({"attention_head_dim": 13}, "must be even"),
        ({"num_layers": "many"}, "no whole number under num_layers"),
        ({"text_dim": 0}, "no whole number under text_dim"),
    ],
)
def test_a_config_of_another_network_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    config = {"_class_name": "WanTransformer3DModel"} | SMALL | change
    assert_config_refused(read_config, tmp_path, config, says)


@pytest.mark.parametrize("index", [{"boundary_ratio": 0.875}, {"expand_timesteps": True}], ids=str)
def test_the_pipelines_of_wan_2_2_are_refused(tmp_path: Path, index: dict[str, object]) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"} | index))
    with pytest.raises(CheckpointError, match=r"only Wan 2\.1's text-to-video"):
        load(CheckpointSource(tmp_path), BACKENDS["sdpa"])


VAE: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 5,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.3, -0.2, 0.1, 0.9, -0.5],
    "latents_std": [1.5, 0.7, 2.0, 1.1, 0.4],
    "scale_factor_spatial": 4,
    "scale_factor_temporal": 4,
}


def test_the_decoder_is_diffusers_own(tmp_path: Path) -> None:
    vae = AutoencoderKLWan(**VAE).eval()
    randomize(vae)
    vae.save_pretrained(tmp_path / "vae")
    decoder = load_wan_decoder(CheckpointSource(tmp_path))
    assert decoder.space == LatentSpace(5, 4, 4)
    latent = torch.randn(2, *decoder.space.shape(12, 20, 9), generator=torch.Generator().manual_seed(0))
    assert latent.shape == (2, 5, 3, 3, 5)
    with torch.no_grad():
        frames = decoder(latent)
        assert frames.shape == (2, 9, 3, 12, 20)
        assert frames.dtype is torch.float32
        assert 0 <= frames.min() < frames.max() <= 1
        mean, std = (torch.tensor(VAE[key])[:, None, None, None] for key in ("latents_mean", "latents_std"))
        expected = vae.decode(latent / (1 / std) + mean).sample / 2 + 0.5
        torch.testing.assert_close(frames, expected.transpose(1, 2), rtol=0, atol=1e-5)
        torch.testing.assert_close(decoder(latent[1:])[0], frames[1], rtol=0, atol=1e-5)


def test_a_vae_of_other_channels_is_refused(tmp_path: Path) -> None:
    their(SMALL | {"in_channels": 4, "out_channels": 4}, tmp_path)
    AutoencoderKLWan(**VAE).save_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="the network has 4 latent channels, the VAE decodes 5"):
        load(CheckpointSource(tmp_path), BACKENDS["sdpa"])


def mend(text: str) -> str:
    """Do a little of what ftfy does, so that a call of it is seen."""
    return text.replace("Ã¶", "ö").replace("\uff0c", ",").replace("“", '"').replace("”", '"')


@pytest.mark.parametrize("mended", [None, mend], ids=["without ftfy", "with ftfy"])
def test_prompts_are_cleaned_as_diffusers_cleans_them(
    monkeypatch: pytest.MonkeyPatch, mended: Callable[[str], str] | None
) -> None:
    module = None
    if mended is not None:
        module = ModuleType("ftfy")
        module.fix_text = mended  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ftfy", module)  # type: ignore[arg-type]
    monkeypatch.setattr(pipeline_wan, "is_ftfy_available", lambda: mended is not None)
    monkeypatch.setattr(pipeline_wan, "ftfy", module, raising=False)
    for prompt in PROMPTS_AS_WRITTEN:
        assert clean(prompt) == pipeline_wan.prompt_clean(prompt)
    assert clean(PROMPTS_AS_WRITTEN[0]) == "a red fox in the snow"
    assert clean(PROMPTS_AS_WRITTEN[1]) == 'rock & roll <3 "live"'
    assert clean(PROMPTS_AS_WRITTEN[3]) == ("色调艳丽,过曝,静态" if mended else PROMPTS_AS_WRITTEN[3])
