"""diffusers' FluxPipeline, for distilled networks and for those with classifier-free guidance."""

from __future__ import annotations

from functools import partial

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor

from harness.baselines.load import load_denoiser
from harness.baselines.model import BaselineModel, BaselinePrompts, PipelineBatch, accept_all, check_guidance, kl_pixels
from models.checkpoint_source import CheckpointSource
from models.components import Components, Conditioning
from models.decoders import load_from_diffusers
from models.flux.prompts import load_flux_prompts
from models.flux.weights import NAMES


def _pack(pipeline: FluxPipeline, latent: Tensor, /) -> Tensor:
    """Return a state in the pipeline's layout: patches of 2 x 2 as tokens."""
    packed: Tensor = pipeline._pack_latents(latent, *latent.shape)
    return packed


def _denoise(pipeline: FluxPipeline, batch: PipelineBatch) -> Tensor:
    """Run the pipeline's loop."""
    scale = batch.spec.guidance
    packed: Tensor = pipeline(
        **batch.prompt_embeds(),
        **batch.pooled_embeds(),
        guidance_scale=scale,
        true_cfg_scale=1.0 if batch.negative is None else scale,
        **batch.shared_arguments(_pack(pipeline, batch.noise).to(pipeline.transformer.dtype)),
    )[0]
    height, width = batch.spec.height, batch.spec.width
    return pipeline._unpack_latents(packed, height, width, pipeline.vae_scale_factor)


def _decode(pipeline: FluxPipeline, latent: Tensor, /) -> Tensor:
    """Decode as the pipeline does."""
    vae = pipeline.vae
    z = latent / vae.config.scaling_factor + vae.config.shift_factor
    return kl_pixels(vae, pipeline.image_processor, z)


def load(source: CheckpointSource, parts: Components) -> BaselineModel:
    """Load the pipeline of a checkpoint. Raises CheckpointError."""
    native_prompts = load_flux_prompts(source)
    native_prompts.clip.tokenizer.model_max_length = native_prompts.clip.max_tokens  # the pipeline reads it there
    pipeline = FluxPipeline(
        scheduler=None,
        vae=load_from_diffusers(source, "vae", AutoencoderKL),
        text_encoder=native_prompts.clip.encoder,
        tokenizer=native_prompts.clip.tokenizer,
        text_encoder_2=native_prompts.t5.encoder,
        tokenizer_2=native_prompts.t5.tokenizer,
        transformer=load_denoiser(source, FluxTransformer2DModel, parts.network, NAMES),
    )

    def encode(prompt: str, negative: bool) -> Conditioning:
        embeds, pooled, _ = pipeline.encode_prompt(prompt, None, max_sequence_length=source.text_tokens)
        return Conditioning(embeds, pooled=pooled)

    return BaselineModel(
        pipeline,
        pipeline.transformer,
        BaselinePrompts(native_prompts, encode),
        partial(_denoise, pipeline),
        partial(_decode, pipeline),
        pack=partial(_pack, pipeline),
        separate_guidance=True,
        check=accept_all if parts.guidance.embedded else check_guidance,
    )
