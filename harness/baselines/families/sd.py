"""diffusers' StableDiffusionPipeline, without its safety checker, which is not part of the comparison."""

from __future__ import annotations

from functools import partial

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from harness.baselines.load import load_denoiser
from harness.baselines.model import BaselineModel, BaselinePrompts, PipelineBatch, kl_pixels
from models.checkpoint_source import CheckpointSource
from models.components import Components, Conditioning
from models.decoders import load_from_diffusers
from models.names import LEGACY_NAMES, NameMap
from models.unet.prompts import load_clip_prompts


def _denoise(pipeline: StableDiffusionPipeline, batch: PipelineBatch) -> Tensor:
    """Run the pipeline's loop."""
    latents: Tensor = pipeline(
        **batch.prompt_embeds(),
        guidance_scale=batch.spec.guidance,
        **batch.shared_arguments(batch.noise.to(pipeline.unet.dtype)),
    )[0]
    return latents


def _decode(pipeline: StableDiffusionPipeline, latent: Tensor, /) -> Tensor:
    """Decode as the pipeline does."""
    vae = pipeline.vae
    return kl_pixels(vae, pipeline.image_processor, latent / vae.config.scaling_factor)


def load(source: CheckpointSource, parts: Components) -> BaselineModel:
    """Load the pipeline of a checkpoint. Raises CheckpointError."""
    native = parts.network.get_submodule("unet")
    native_prompts = load_clip_prompts(source)
    native_prompts.clip.tokenizer.model_max_length = native_prompts.max_tokens  # the pipeline reads it there
    pipeline = StableDiffusionPipeline(
        vae=load_from_diffusers(source, "vae", AutoencoderKL),
        text_encoder=native_prompts.clip.encoder,
        tokenizer=native_prompts.clip.tokenizer,
        unet=load_denoiser(source, UNet2DConditionModel, native, NameMap(), stored=LEGACY_NAMES),
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

    def encode(prompt: str, negative: bool) -> Conditioning:
        embeds, _ = pipeline.encode_prompt(prompt, source.device, 1, False)
        return Conditioning(embeds)

    return BaselineModel(
        pipeline,
        pipeline.unet,
        BaselinePrompts(native_prompts, encode),
        partial(_denoise, pipeline),
        partial(_decode, pipeline),
    )
