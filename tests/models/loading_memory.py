"""Loads one component in a process of its own and prints its weights' bytes and the peak of its resident set over them.

`python -m tests.models.loading_memory KIND FOLDER DTYPE`, KIND being pixart, pixart_half, vae, unet, t5 or clip.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from harness.device.memory import ResidentMemory
from harness.parallel.group import Group, TrafficCounter
from harness.parallel.parallelize import shard_linears
from models.decoders import load_from_diffusers
from models.pixart import load_denoiser
from models.source import Source
from models.text.load import load_encoder

HALF = partial(shard_linears, group=Group((0, 1), 0, None, TrafficCounter()))
LOAD: dict[str, Callable[[Source], nn.Module]] = {
    "pixart": load_denoiser,
    "pixart_half": lambda source: load_denoiser(replace(source, cut=HALF)),
    "vae": lambda source: load_from_diffusers(source, "vae", AutoencoderKL),
    "unet": lambda source: load_from_diffusers(source, "unet", UNet2DConditionModel),
    "t5": lambda source: load_encoder(source, "text_encoder", T5EncoderModel, T5Config),
    "clip": lambda source: load_encoder(source, "text_encoder", CLIPTextModel, CLIPTextConfig),
}


def main(kind: str, folder: str, dtype: str) -> None:
    """Peak bytes over the baseline after imports, and the weights' own."""
    torch.set_num_threads(1)
    memory = ResidentMemory()
    source = Source(Path(folder), "unet" if kind == "unet" else "transformer", dtype=getattr(torch, dtype))
    gc.collect()
    memory.reset_peak()
    before = memory.used_mib()
    network = LOAD[kind](source)
    peak = memory.peak_mib() - before
    weights = sum(p.numel() * p.element_size() for p in network.parameters()) / 2**20
    print(f"{weights:.1f} {peak:.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
