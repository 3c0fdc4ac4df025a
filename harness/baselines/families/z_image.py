"""diffusers' ZImagePipeline, whose guidance counts from 0 and whose prompt embeddings are lists."""

from __future__ import annotations

from functools import partial

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from torch import Tensor

from harness.baselines.load import load_denoiser
from harness.baselines.model import BaselineModel, BaselinePrompts, PipelineBatch, kl_pixels
from models.checkpoint_source import CheckpointSource
from models.components import Components, Conditioning
from models.decoders import load_from_diffusers
from models.z_image.prompts import load_z_image_prompts
from models.z_image.weights import NAMES


def _denoise(pipeline: ZImagePipeline, batch: PipelineBatch) -> Tensor:
    """Run the pipeline's loop, whose state is float32: prompt + scale * (prompt - negative), so 0 means no guidance."""
    latents: Tensor = pipeline(
        prompt_embeds=_rows(batch.text),
        negative_prompt_embeds=[] if batch.negative is None else _rows(batch.negative),
        guidance_scale=batch.spec.guidance - 1,
        **batch.shared_arguments(batch.noise),
    )[0]
    return latents


def _decode(pipeline: ZImagePipeline, latent: Tensor, /) -> Tensor:
    """Decode as the pipeline does."""
    vae = pipeline.vae
    z = latent.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return kl_pixels(vae, pipeline.image_processor, z)


def _rows(text: Conditioning) -> list[Tensor]:
    """Return each prompt's embeddings without padding."""
    embeds = text.require_prompt_embeds()
    return list(embeds) if text.mask is None else [row[mask] for row, mask in zip(embeds, text.mask, strict=True)]


def load(source: CheckpointSource, parts: Components) -> BaselineModel:
    """Load the pipeline of a checkpoint. Raises CheckpointError."""
    native_prompts = load_z_image_prompts(source)
    pipeline = ZImagePipeline(
        scheduler=None,
        vae=load_from_diffusers(source, "vae", AutoencoderKL),
        text_encoder=native_prompts.encoder,
        tokenizer=native_prompts.tokenizer,
        transformer=load_denoiser(source, ZImageTransformer2DModel, parts.network, NAMES),
    )

    def encode(prompt: str, negative: bool) -> Conditioning:
        embeds, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=source.text_tokens
        )
        return Conditioning(embeds[0][None])

    return BaselineModel(
        pipeline,
        pipeline.transformer,
        BaselinePrompts(native_prompts, encode),
        partial(_denoise, pipeline),
        partial(_decode, pipeline),
    )
