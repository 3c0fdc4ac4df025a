"""diffusers' StableDiffusionXLPipeline for base checkpoints, without a watermark."""

from __future__ import annotations

from functools import partial

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from torch import Tensor

from harness.baselines.load import load_denoiser
from harness.baselines.model import BaselineModel, BaselinePrompts, PipelineBatch, kl_pixels
from models.checkpoint_source import CheckpointSource
from models.components import Components, Conditioning
from models.decoders import load_from_diffusers
from models.names import LEGACY_NAMES, NameMap
from models.unet.prompts import load_two_clip_prompts


def _denoise(pipeline: StableDiffusionXLPipeline, batch: PipelineBatch) -> Tensor:
    """Run the pipeline's loop."""
    latents: Tensor = pipeline(
        **batch.prompt_embeds(),
        **batch.pooled_embeds(),
        guidance_scale=batch.spec.guidance,
        **batch.shared_arguments(batch.noise.to(pipeline.unet.dtype)),
    )[0]
    return latents


def _decode(pipeline: StableDiffusionXLPipeline, latent: Tensor, /) -> Tensor:
    """Decode as the pipeline does, with a scale per channel if the autoencoder has them."""
    vae = pipeline.vae
    config = vae.config
    z = latent / config.scaling_factor
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (
            latent.new_tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )
        z = latent * std / config.scaling_factor + mean
    return kl_pixels(vae, pipeline.image_processor, z)


def load(source: CheckpointSource, parts: Components) -> BaselineModel:
    """Load the pipeline of a checkpoint. Raises CheckpointError."""
    native = parts.network.get_submodule("unet")
    native_prompts = load_two_clip_prompts(source)
    for clip in (native_prompts.first, native_prompts.second):
        clip.tokenizer.model_max_length = clip.max_tokens  # the pipeline reads it there
    pipeline = StableDiffusionXLPipeline(
        vae=load_from_diffusers(source, "vae", AutoencoderKL),
        text_encoder=native_prompts.first.encoder,
        text_encoder_2=native_prompts.second.encoder,
        tokenizer=native_prompts.first.tokenizer,
        tokenizer_2=native_prompts.second.tokenizer,
        unet=load_denoiser(source, UNet2DConditionModel, native, NameMap(), stored=LEGACY_NAMES),
        scheduler=None,
        force_zeros_for_empty_prompt=native_prompts.zeros_for_empty,
        add_watermarker=False,
    )

    def encode(prompt: str, negative: bool) -> Conditioning:
        embeds, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        if negative and not prompt and native_prompts.zeros_for_empty:  # as the pipeline does without a negative prompt
            return Conditioning(torch.zeros_like(embeds), pooled=torch.zeros_like(pooled))
        return Conditioning(embeds, pooled=pooled)

    return BaselineModel(
        pipeline,
        pipeline.unet,
        BaselinePrompts(native_prompts, encode),
        partial(_denoise, pipeline),
        partial(_decode, pipeline),
    )
