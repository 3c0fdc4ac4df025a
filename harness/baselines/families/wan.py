"""diffusers' WanPipeline, for Wan 2.1's text-to-video checkpoints."""

from __future__ import annotations

from functools import partial

from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from torch import Tensor

from harness.baselines.load import load_denoiser
from harness.baselines.model import BaselineModel, BaselinePrompts, PipelineBatch
from models.checkpoint_source import CheckpointSource
from models.components import Components, Conditioning
from models.decoders import load_from_diffusers
from models.wan.prompts import load_umt5_prompts
from models.wan.weights import NAMES


def _denoise(pipeline: WanPipeline, batch: PipelineBatch) -> Tensor:
    """Run the pipeline's loop, whose state is float32."""
    latents: Tensor = pipeline(
        **batch.prompt_embeds(),
        num_frames=batch.spec.frames,
        guidance_scale=batch.spec.guidance,
        **batch.shared_arguments(batch.noise),
    )[0]
    return latents


def _decode(pipeline: WanPipeline, latent: Tensor, /) -> Tensor:
    """Decode as the pipeline does."""
    vae = pipeline.vae
    mean, std = (
        latent.new_tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    video = vae.decode((latent * std + mean).to(vae.dtype), return_dict=False)[0]
    pixels: Tensor = pipeline.video_processor.postprocess_video(video, output_type="pt")
    return pixels.float()


def load(source: CheckpointSource, parts: Components) -> BaselineModel:
    """Load the pipeline of a checkpoint. Raises CheckpointError."""
    native_prompts = load_umt5_prompts(source)
    pipeline = WanPipeline(
        tokenizer=native_prompts.tokenizer,
        text_encoder=native_prompts.encoder,
        vae=load_from_diffusers(source, "vae", AutoencoderKLWan),
        scheduler=None,
        transformer=load_denoiser(source, WanTransformer3DModel, parts.network, NAMES),
    )

    def encode(prompt: str, negative: bool) -> Conditioning:
        embeds, _ = pipeline.encode_prompt(prompt, None, False, max_sequence_length=source.text_tokens)
        return Conditioning(embeds)

    return BaselineModel(
        pipeline,
        pipeline.transformer,
        BaselinePrompts(native_prompts, encode),
        partial(_denoise, pipeline),
        partial(_decode, pipeline),
        separate_guidance=True,
    )
