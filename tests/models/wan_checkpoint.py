"""A whole Wan checkpoint of random weights, small enough to draw a video in a second: diffusers' own pipeline of it."""

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from models.files import read_json
from models.registry import PUBLISHED
from models.text.t5 import T5_DUMMY_TOKENIZER
from tests.models.parity import randomize

TOKENS = 24
OVERRIDES = ("model=wan_1_3b", "model.dtype=float32", f"model.text.tokens={TOKENS}")
"""What a run of it is told beside model.path: the published settings, in float32 and with short prompts."""


def tiny_wan(heads: int = 2) -> WanPipeline:
    """diffusers' pipeline of Wan with the published noise scheduler, float32, everything in it random and lively."""
    transformer = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=40,
        num_layers=2,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.3, -0.2, 0.1, 0.5],
        latents_std=[1.5, 0.7, 1.2, 0.9],
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    )
    sizes = {"vocab_size": 320, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu"))
    for number, part in enumerate((transformer, vae, encoder)):
        randomize(part.eval(), number)
    file = PUBLISHED / "wan_1_3b" / "scheduler" / "scheduler_config.json"
    pipeline = WanPipeline(
        tokenizer=T5_DUMMY_TOKENIZER.build(),
        text_encoder=encoder,
        vae=vae,
        scheduler=UniPCMultistepScheduler.from_config(read_json(file)),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
