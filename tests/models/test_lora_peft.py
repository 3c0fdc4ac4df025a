"""Merged updates give what diffusers and PEFT give with the same file; runs only where PEFT is installed."""

from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from models.checkpoint_source import CheckpointSource, LoraFile
from models.components import Conditioning
from models.decoders import load_from_diffusers
from models.pixart import load_denoiser
from models.registry import REFERENCE
from tests.fixtures.models.lora import KOHYA, UNET, Made, kohya, tiny, unet_layers
from tests.fixtures.models.parity import rel_l2

peft = pytest.importorskip("peft")
BOUND = 1e-5


def liven(network: nn.Module) -> None:
    """Give B random numbers: PEFT starts with B = 0."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3


def settings(rslora: bool, layers: list[str]) -> peft.LoraConfig:
    """Return ranks and alphas that differ between layers."""
    return peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=layers,
        rank_pattern={"ff.net.2": 2},
        alpha_pattern={"to_q": 3},
        use_rslora=rslora,
    )


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_a_transformer_that_peft_trained(rslora: bool, tmp_path: Path) -> None:
    folder = REFERENCE / "emoji" / "transformer"
    theirs = PixArtTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    latent, text, tau = torch.randn(2, 4, 16, 16), torch.randn(2, 6, 256), torch.tensor([3.0, 700.0])
    added = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        plain = theirs(latent, text, tau, added_cond_kwargs=added).sample
        layers = ["to_q", "to_out.0", "ff.net.2", "pos_embed.proj", "adaln_single.linear"]
        trained = peft.get_peft_model(theirs, settings(rslora, layers))
        liven(trained)
        expected = trained(latent, text, tau, added_cond_kwargs=added).sample
        trained.save_pretrained(tmp_path)
        lora = LoraFile(tmp_path / "adapter_model.safetensors")
        ours = load_denoiser(CheckpointSource(REFERENCE / "emoji", loras=(lora,)))(latent, tau, Conditioning(text))
    assert rel_l2(ours, expected) < BOUND
    assert rel_l2(plain, expected) > 0.1


def unets(tmp_path: Path) -> tuple[UNet2DConditionModel, tuple[torch.Tensor, ...]]:
    theirs = tiny(UNet2DConditionModel, UNET)
    theirs.save_pretrained(tmp_path / "unet")
    return theirs, (torch.randn(1, 4, 8, 8), torch.tensor(7), torch.randn(1, 5, 24))


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("weight", [1.0, -0.6])
def test_a_unet_that_diffusers_saved(rslora: bool, weight: float, tmp_path: Path) -> None:
    theirs, inputs = unets(tmp_path)
    config = settings(rslora, ["to_q", "to_out.0", "ff.net.2", "conv1", "conv_shortcut", "proj_in"])
    with torch.no_grad():
        plain = theirs(*inputs).sample
        theirs.add_adapter(config)
        liven(theirs)
        StableDiffusionPipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=peft.get_peft_model_state_dict(theirs),
            unet_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
        )
        theirs.set_adapters(["default"], [weight])
        expected = theirs(*inputs).sample
        lora = LoraFile(tmp_path / "pytorch_lora_weights.safetensors", weight)
        ours = load_from_diffusers(CheckpointSource(tmp_path, "unet", loras=(lora,)), "unet", UNet2DConditionModel)
        assert rel_l2(ours(*inputs).sample, expected) < BOUND
    assert rel_l2(plain, expected) > 0.1


def test_kohyas_unet_as_diffusers_loads_it(tmp_path: Path) -> None:
    """One alpha for all layers: where they differ, diffusers 0.42 gives attention the commonest one, with a warning."""
    theirs, inputs = unets(tmp_path)
    made = Made()
    for number, (name, shape) in enumerate(unet_layers(theirs)):
        made.layer(f"{name}.weight", shape, kohya("lora_unet_", name), 2 + number % 3, 2.0, KOHYA)
    lora = made.save(tmp_path / "a.safetensors")
    with torch.no_grad():
        plain = theirs(*inputs).sample
        state, alphas = StableDiffusionPipeline.lora_state_dict(str(lora.path))
        StableDiffusionPipeline.load_lora_into_unet(state, alphas, theirs)
        expected = theirs(*inputs).sample
        ours = load_from_diffusers(CheckpointSource(tmp_path, "unet", loras=(lora,)), "unet", UNet2DConditionModel)
        assert rel_l2(ours(*inputs).sample, expected) < BOUND
    assert rel_l2(plain, expected) > 0.1
