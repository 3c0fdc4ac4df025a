"""diffusers' PixArtAlphaPipeline and PixArtSigmaPipeline, also for the built-in reference model."""

from __future__ import annotations

from functools import partial

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from torch import Tensor

from harness.baselines.load import load_denoiser
from harness.baselines.model import BaselineModel, BaselinePrompts, PipelineBatch, kl_pixels
from models.checkpoint_source import CheckpointSource
from models.components import Components, Conditioning
from models.decoders import load_from_diffusers
from models.pixart.weights import NAMES
from models.text.t5 import load_t5_prompts


def _denoise(pipeline: PixArtAlphaPipeline | PixArtSigmaPipeline, batch: PipelineBatch) -> Tensor:
    """Run the pipeline's loop, without its change of size and its cleaning of captions."""
    negative = batch.negative
    latents: Tensor = pipeline(
        prompt=None,
        negative_prompt=None,
        **batch.prompt_embeds(),
        prompt_attention_mask=batch.text.mask,
        negative_prompt_attention_mask=None if negative is None else negative.mask,
        guidance_scale=batch.spec.guidance,
        use_resolution_binning=False,
        clean_caption=False,
        **batch.shared_arguments(batch.noise.to(pipeline.transformer.dtype)),
    )[0]
    return latents


def _decode(pipeline: PixArtAlphaPipeline | PixArtSigmaPipeline, latent: Tensor, /) -> Tensor:
    """Decode as the pipeline does."""
    vae = pipeline.vae
    return kl_pixels(vae, pipeline.image_processor, latent / vae.config.scaling_factor)


def load(source: CheckpointSource, parts: Components) -> BaselineModel:
    """Load the pipeline of a checkpoint: the one that it names, else PixArt-Sigma's. Raises CheckpointError."""
    kind = PixArtAlphaPipeline if source.index().get("_class_name") == "PixArtAlphaPipeline" else PixArtSigmaPipeline
    native_prompts = load_t5_prompts(source, lowercase=True)
    pipeline = kind(
        tokenizer=native_prompts.tokenizer,
        text_encoder=native_prompts.encoder,
        vae=load_from_diffusers(source, "vae", AutoencoderKL),
        transformer=load_denoiser(source, PixArtTransformer2DModel, parts.network, NAMES, ("Transformer2DModel",)),
        scheduler=None,
    )

    def encode(prompt: str, negative: bool) -> Conditioning:
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompt, False, clean_caption=False, max_sequence_length=source.text_tokens
        )
        return Conditioning(embeds, mask.bool())

    return BaselineModel(
        pipeline,
        pipeline.transformer,
        BaselinePrompts(native_prompts, encode),
        partial(_denoise, pipeline),
        partial(_decode, pipeline),
    )
