"""Tiny random CLIP, T5 and VAE of the kinds that Stable Diffusion 3 and FLUX carry, and an engine over a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from harness.client.generator import DiffusionGenerator
from harness.resolve.compose import compose_run
from models.text.load import DummyTokenizer
from tests.models.parity import randomize

T5_TOKENS = 20
STRIDE = 2  # pixels of a latent pixel


def clip(
    width: int, projected: bool, seed: int, end: int = 299, pad: str = "<|endoftext|>"
) -> tuple[CLIPTextModel | CLIPTextModelWithProjection, PreTrainedTokenizerBase]:
    """A CLIP text encoder and its tokenizer.

    Args:
        width: channels of a state.
        projected: its pooled vector goes through a projection, to half as many channels.
        seed: of its weights.
        end: the configuration's eos_token_id; 2 means the largest id, as in the published files.
        pad: name of the token that pads.
    """
    config = CLIPTextConfig(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=width // 2,
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=298,
        eos_token_id=end,
        pad_token_id=1,
    )
    encoder = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()
    randomize(encoder, seed)
    special = {"<|pad|>": 297, "<|startoftext|>": 298, "<|endoftext|>": 299}
    roles = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad}
    template = "<|startoftext|> $A <|endoftext|>"
    tokenizer = DummyTokenizer(special, roles, template, first_byte=0, extra={"model_max_length": 77}).build()
    return encoder, tokenizer


def t5(width: int, seed: int) -> tuple[T5EncoderModel, PreTrainedTokenizerBase]:
    """A T5 text encoder and its tokenizer."""
    config = T5Config(
        vocab_size=260,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
    )
    encoder = T5EncoderModel(config).eval()
    randomize(encoder, seed)
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return encoder, DummyTokenizer(special, roles, "$A </s>", extra={"model_max_length": 512}).build()


def vae(channels: int, scaling: float, shift: float) -> AutoencoderKL:
    """A KL autoencoder of stride 2 without quantisation convolutions."""
    found = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    randomize(found, 6)
    return found


@contextmanager
def engine(model: str, folder: Path, *overrides: str) -> Iterator[DiffusionGenerator]:
    """Triptych over a tiny checkpoint, in float32, in this process."""
    own = [
        f"model={model}",
        f"model.path={folder}",
        "model.dtype=float32",
        f"model.size_multiple={2 * STRIDE}",
        f"model.text.tokens={T5_TOKENS}",
        "launch.mode=inprocess",
        "launch.threads_per_rank=1",
        "logger=json",
    ]
    from harness.engines.inprocess import InprocessEngine

    config = compose_run([*own, *overrides]).config
    with DiffusionGenerator(config, InprocessEngine(config)) as generator:
        yield generator


def lively(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The module in evaluation mode, its parameters random."""
    randomize(module, seed)
    return module.eval()
