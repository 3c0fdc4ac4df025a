"""diffusers' QwenImagePipeline, whose text encoder is the vision_language_model vision-language model."""

from __future__ import annotations

from functools import partial

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from harness.baselines.load import load_denoiser
from harness.baselines.model import BaselineModel, BaselinePrompts, PipelineBatch
from models.checkpoint_source import CheckpointSource
from models.components import Components, Conditioning
from models.decoders import load_from_diffusers
from models.qwen_image.prompts import QwenImagePrompts
from models.qwen_image.weights import NAMES
from models.text.load import load_encoder, load_tokenizer
from models.text.qwen import QWEN_DUMMY_TOKENIZER


def _pack(pipeline: QwenImagePipeline, latent: Tensor, /) -> Tensor:
    """Return a state in the pipeline's layout: patches of 2 x 2 as tokens."""
    packed: Tensor = pipeline._pack_latents(latent, *latent.shape)
    return packed


def _denoise(pipeline: QwenImagePipeline, batch: PipelineBatch) -> Tensor:
    """Run the pipeline's loop."""
    negative = batch.negative
    packed: Tensor = pipeline(
        **batch.prompt_embeds(),
        prompt_embeds_mask=batch.text.mask,
        negative_prompt_embeds_mask=None if negative is None else negative.mask,
        true_cfg_scale=batch.spec.guidance,
        **batch.shared_arguments(_pack(pipeline, batch.noise).to(pipeline.transformer.dtype)),
    )[0]
    height, width = batch.spec.height, batch.spec.width
    return pipeline._unpack_latents(packed, height, width, pipeline.vae_scale_factor)[:, :, 0]


def _decode(pipeline: QwenImagePipeline, latent: Tensor, /) -> Tensor:
    """Decode as the pipeline does."""
    vae = pipeline.vae
    mean, std = (
        latent.new_tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    z = latent.unsqueeze(2) * std + mean
    image = vae.decode(z.to(vae.dtype), return_dict=False)[0][:, :, 0]
    pixels: Tensor = pipeline.image_processor.postprocess(image, output_type="pt")
    return pixels.float()


def load(source: CheckpointSource, parts: Components) -> BaselineModel:
    """Load the pipeline of a checkpoint. Raises CheckpointError."""
    vision_language_model = load_encoder(source, "text_encoder", Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig)
    tokenizer = load_tokenizer(source, "tokenizer", QWEN_DUMMY_TOKENIZER)
    pipeline = QwenImagePipeline(
        scheduler=None,
        vae=load_from_diffusers(source, "vae", AutoencoderKLQwenImage),
        text_encoder=vision_language_model,
        tokenizer=tokenizer,
        transformer=load_denoiser(source, QwenImageTransformer2DModel, parts.network, NAMES),
    )

    def encode(prompt: str, negative: bool) -> Conditioning:
        embeds, mask = pipeline.encode_prompt(prompt, max_sequence_length=source.text_tokens)
        if mask is None:  # all tokens are real; an explicit mask keeps the pipeline from warning
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        return Conditioning(embeds, mask.bool())

    counter = QwenImagePrompts(vision_language_model.model.language_model, tokenizer, source.text_tokens)
    return BaselineModel(
        pipeline,
        pipeline.transformer,
        BaselinePrompts(counter, encode),
        partial(_denoise, pipeline),
        partial(_decode, pipeline),
        pack=partial(_pack, pipeline),
        separate_guidance=True,
    )
