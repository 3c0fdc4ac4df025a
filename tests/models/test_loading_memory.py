"""Loading takes the memory of the weights and at most 0.15 of them more, whatever dtype they are stored in.

A rank of two that share the linears holds half of them, and takes no more than its half.

The peak is the resident set's high-water mark (VmHWM, reset through /proc/self/clear_refs), over the baseline after
imports, in one child process for each case.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from models.configs.pixart import config_json
from models.meta_init import build_empty, fill_dummy
from models.pixart import NAMES, PixArt, PixArtConfig

BOUND = 1.15
PIXART = PixArtConfig(
    depth=14, heads=16, head_channels=72, in_channels=4, out_channels=4, sample_size=64, text_channels=4096
)  # 313 M parameters, 627 MB in bfloat16
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}  # Stable Diffusion's: 84 M parameters
UNET = {"block_out_channels": (128, 256, 512, 512), "cross_attention_dim": 768}
CLIP = CLIPTextConfig(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)
T5 = T5Config(d_model=1024, d_kv=64, d_ff=2816, num_layers=12, num_heads=16, feed_forward_proj="gated-gelu")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be reset here"),
]


def cut(tensors: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    """Save a denoiser's tensors in one file or in several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(PIXART)))
    if shards == 1:
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        return
    places = {}
    for n in range(shards):
        file = f"diffusion_pytorch_model-{n + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[n::shards]}
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def make(kind: str, stored: torch.dtype, shards: int, folder: Path) -> None:
    """Save random weights of one kind of network."""
    build = {
        "pixart": lambda: PixArt(PIXART),
        "pixart_half": lambda: PixArt(PIXART),
        "vae": lambda: AutoencoderKL(**VAE),
        "unet": lambda: UNet2DConditionModel(**UNET),
        "t5": lambda: T5EncoderModel(T5),
        "clip": lambda: CLIPTextModel(CLIP),
    }[kind]
    network: nn.Module = build_empty(build, stored)
    fill_dummy(network)
    if kind.startswith("pixart"):
        cut(
            {NAMES.to_published(name): tensor for name, tensor in network.state_dict().items()},
            folder / "transformer",
            shards,
        )
    else:
        network.save_pretrained(folder / (kind if kind in ("vae", "unet") else "text_encoder"))


@pytest.mark.parametrize(
    ("kind", "stored", "shards", "wanted"),
    [
        ("pixart", "bfloat16", 1, "bfloat16"),
        ("pixart", "bfloat16", 3, "bfloat16"),
        ("pixart", "bfloat16", 1, "float32"),
        ("pixart", "float32", 1, "bfloat16"),
        ("pixart", "float32", 3, "bfloat16"),
        ("pixart_half", "bfloat16", 1, "bfloat16"),
        ("pixart_half", "float32", 3, "bfloat16"),
        ("vae", "float32", 1, "bfloat16"),
        ("vae", "float32", 1, "float32"),
        ("unet", "float32", 1, "bfloat16"),
        ("t5", "bfloat16", 1, "bfloat16"),
        ("t5", "float32", 1, "bfloat16"),
        ("t5", "bfloat16", 1, "float32"),
        ("clip", "float32", 1, "bfloat16"),
    ],
)
def test_loading_takes_the_memory_of_the_weights(
    kind: str, stored: str, shards: int, wanted: str, tmp_path: Path
) -> None:
    make(kind, getattr(torch, stored), shards, tmp_path)
    command = [sys.executable, "-m", "tests.fixtures.models.loading_memory", kind, str(tmp_path), wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    weights, peak = map(float, done.stdout.split())
    print(f"{kind} {stored} x {shards} to {wanted}: {weights:.0f} MiB, peak {peak / weights:.3f} of them")
    assert 0.9 < peak / weights < BOUND
    if kind == "pixart_half":
        whole = build_empty(lambda: PixArt(PIXART), torch.bfloat16, "meta")
        assert weights < 0.55 * sum(p.numel() * p.element_size() for p in whole.parameters()) / 2**20
