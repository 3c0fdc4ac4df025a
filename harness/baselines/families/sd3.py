"""diffusers' StableDiffusion3Pipeline."""

from __future__ import annotations

from functools import partial

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from torch import Tensor

from harness.baselines.load import load_denoiser
from harness.baselines.model import BaselineModel, BaselinePrompts, PipelineBatch, kl_pixels
from models.checkpoint_source import CheckpointSource
from models.components import Components, Conditioning
from models.decoders import load_from_diffusers
from models.sd3.prompts import load_sd3_prompts
from models.sd3.weights import NAMES


def _denoise(pipeline: StableDiffusion3Pipeline, batch: PipelineBatch) -> Tensor:
    """Run the pipeline's loop."""
    latents: Tensor = pipeline(
        **batch.prompt_embeds(),
        **batch.pooled_embeds(),
        guidance_scale=batch.spec.guidance,
        **batch.shared_arguments(batch.noise.to(pipeline.transformer.dtype)),
    )[0]
    return latents


def _decode(pipeline: StableDiffusion3Pipeline, latent: Tensor, /) -> Tensor:
    """Decode as the pipeline does."""
    vae = pipeline.vae
    z = latent / vae.config.scaling_factor + vae.config.shift_factor
    return kl_pixels(vae, pipeline.image_processor, z)


def load(source: CheckpointSource, parts: Components) -> BaselineModel:
    """Load the pipeline of a checkpoint. Raises CheckpointError."""
    network = load_denoiser(source, SD3Transformer2DModel, parts.network, NAMES)
    native_prompts = load_sd3_prompts(source, network.config.joint_attention_dim)
    for clip in native_prompts.clips:
        clip.tokenizer.model_max_length = clip.max_tokens  # the pipeline reads it there
    pipeline = StableDiffusion3Pipeline(
        transformer=network,
        scheduler=None,
        vae=load_from_diffusers(source, "vae", AutoencoderKL),
        text_encoder=native_prompts.clips[0].encoder,
        tokenizer=native_prompts.clips[0].tokenizer,
        text_encoder_2=native_prompts.clips[1].encoder,
        tokenizer_2=native_prompts.clips[1].tokenizer,
        text_encoder_3=None if native_prompts.t5 is None else native_prompts.t5.encoder,
        tokenizer_3=None if native_prompts.t5 is None else native_prompts.t5.tokenizer,
    )

    def encode(prompt: str, negative: bool) -> Conditioning:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=source.text_tokens
        )
        return Conditioning(embeds, pooled=pooled)

    return BaselineModel(
        pipeline,
        pipeline.transformer,
        BaselinePrompts(native_prompts, encode),
        partial(_denoise, pipeline),
        partial(_decode, pipeline),
    )
