"""The parts of a loaded checkpoint: a denoising network, a prompt encoder and a latent decoder.

Shapes: B samples, S text tokens, T text channels, P pooled channels, C latent channels, F latent frames (video only), H
and W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import AttentionKernel
from models.checkpoint_source import CheckpointSource
from models.plan import UNSHARDED, ParallelPlan, PrecomputePlan


@dataclass(frozen=True)
class Conditioning:
    """The inputs of the network besides the latent and the time, one row per sample; a network reads those it needs.

    Args:
        prompt_embeds: The text encoder's token states of the prompt, (B, S, T).
        mask: The token mask, (B, S), true for a real token; None if all tokens are real.
        pooled: One vector per prompt, (B, P).
        labels: Class indices, (B,) int64.
        scale: The guidance scale that a guidance-distilled network is conditioned on, (B,) float32.
        temb: The network's time embedding, (B, ...), if it is precomputed (PrecomputableNetwork).
        encoder_hidden_states: The network's own embedding of the text, (B, S, ...), if it is precomputed; it replaces
            prompt_embeds, and mask then belongs to it.
    """

    prompt_embeds: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    labels: Tensor | None = None
    scale: Tensor | None = None
    temb: Tensor | None = None
    encoder_hidden_states: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Conditioning:
        """Return a copy with the prompt embeddings and the pooled vector in the network's dtype."""
        return replace(
            self,
            prompt_embeds=None if self.prompt_embeds is None else self.prompt_embeds.to(dtype),
            pooled=None if self.pooled is None else self.pooled.to(dtype),
        )

    def require_prompt_embeds(self) -> Tensor:
        """Return the prompt embeddings, for a network that needs them.

        Raises:
            ValueError: There are none.
        """
        if self.prompt_embeds is None:
            raise ValueError("this network needs prompt embeddings, but its conditioning has none")
        return self.prompt_embeds

    def require_pooled(self) -> Tensor:
        """Return the pooled vector, for a network that needs it.

        Raises:
            ValueError: There is none.
        """
        if self.pooled is None:
            raise ValueError("this network needs a pooled text vector, but its conditioning has none")
        return self.pooled

    @staticmethod
    def stack(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate several conditionings into one batch; shorter prompts are padded at the end, and masked there."""
        parts = _pad_to_same_length(parts)
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Conditioning)}
        return Conditioning(**{name: None if c[0] is None else torch.cat(c) for name, c in columns.items()})


def _pad_to_same_length(parts: Sequence[Conditioning]) -> list[Conditioning]:
    texts = [part.prompt_embeds if part.encoder_hidden_states is None else part.encoder_hidden_states for part in parts]
    lengths = [0 if text is None else text.shape[1] for text in texts]
    if len(set(lengths)) == 1 and len({part.mask is None for part in parts}) == 1:
        return list(parts)
    padded = []
    for part, text, length in zip(parts, texts, lengths, strict=True):
        if text is None:
            raise ValueError("samples with and without prompt embeddings cannot share a batch")
        mask = torch.ones(text.shape[:2], dtype=torch.bool) if part.mask is None else part.mask
        padding = max(lengths) - length
        mask, text = F.pad(mask.to(text.device), (0, padding)), F.pad(text, (0, 0, 0, padding))
        padded_text = {"prompt_embeds": text} if part.encoder_hidden_states is None else {"encoder_hidden_states": text}
        padded.append(replace(part, mask=mask, **padded_text))
    return padded


@dataclass(frozen=True)
class LatentSpace:
    """The geometry of the latent that is denoised.

    Args:
        channels: The number of latent channels, C.
        stride: The number of image pixels per latent pixel, along a side.
        frame_stride: The number of frames per latent frame after the first; None for images.
    """

    channels: int
    stride: int
    frame_stride: int | None = None

    def shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """Return (C, H, W), or (C, F, H, W) for video, of an image or video given in pixels and frames."""
        if self.frame_stride is None:
            return (self.channels, height // self.stride, width // self.stride)
        return (self.channels, (frames - 1) // self.frame_stride + 1, height // self.stride, width // self.stride)


@dataclass(frozen=True)
class GuidanceRule:
    """How a checkpoint uses request.guidance; the default is classifier-free guidance of the whole output.

    Args:
        embedded: Whether the network is guidance-distilled, so that it gets the scale as an input (Conditioning.scale)
            and has no negative branch.
        channels: The number of output channels that guidance applies to, from the first; the others are the positive
            branch's. None means all.
        token_norm: The side of a token in latent pixels, if each token of the guided output is rescaled to the norm of
            the positive branch. None means no rescaling.
        possible: Whether there is a prompt that guidance can use.
    """

    embedded: bool = False
    channels: int | None = None
    token_norm: int | None = None
    possible: bool = True


CLASSIFIER_FREE = GuidanceRule()


@dataclass(frozen=True)
class Components:
    """The loaded parts of one checkpoint.

    Args:
        network: The network (latent, tau_B, conditioning) to the raw output, as in Denoiser.
        load_prompts: The loader of the prompt encoder; it is called again if the encoder was dropped from memory.
        decoder: The decoder from latents to pixels.
        latent: The geometry of the latent.
        size_multiple: The number of image pixels per token of the network, along a side.
        guidance: How the checkpoint uses request.guidance.
        plan: How the network can be sharded over ranks.
        precompute: What of the network can be computed before its evaluations; None if it is no PrecomputableNetwork.
        check_prompt: A check that raises ValueError for a prompt that the model cannot take (an unknown class name).
        learned_variance: Whether the network outputs 2 C channels.
        even_sigmas: Whether the published pipeline passes its noise scheduler sigmas from 1 to 1 / n instead of the
            scheduler's own (FLUX, Qwen-Image and Z-Image do).
        max_side: The image side, in pixels, at which the network's positions end; None if they do not end.
        capturable: Whether an evaluation of sizes seen before reads nothing from the CPU's memory, so that a CUDA graph
            can capture and replay it.
    """

    network: nn.Module
    load_prompts: Callable[[], PromptEncoder]
    decoder: Decoder
    latent: LatentSpace
    size_multiple: int
    guidance: GuidanceRule = CLASSIFIER_FREE
    plan: ParallelPlan = UNSHARDED
    precompute: PrecomputePlan | None = None
    check_prompt: Callable[[str], None] = lambda prompt: None
    learned_variance: bool = False
    even_sigmas: bool = False
    max_side: int | None = None
    capturable: bool = True


class Denoiser(Protocol):
    """The call of every native network."""

    def __call__(self, latent: Tensor, tau_B: Tensor, condition: Conditioning, /) -> Tensor:
        """Evaluate the network once.

        Args:
            latent: The noisy state, already scaled by c_in, (B, C, H, W) or (B, C, F, H, W), in the network's dtype.
            tau_B: The noise scheduler's time input, float32 (1000 t for a flow, the index for DDPM).
            condition: The other inputs, in the network's dtype.

        Returns:
            The raw output of the same spatial shape, with C channels, or 2 C with a learned variance.
        """


class PrecomputableNetwork(Denoiser, Protocol):
    """A network that can embed repeated inputs before its evaluations; every transformer here is one."""

    def embed_time(self, latent: Tensor, tau_B: Tensor, condition: Conditioning, /) -> Tensor:
        """Return the time embedding of the blocks, (B, ...): Conditioning.temb if no module is precomputed.

        Args:
            latent: The latent of any number of samples; only its shape and dtype are read.
            tau_B: The time, as in an evaluation.
            condition: The conditioning, as in an evaluation; the text is not read.
        """

    def embed_text(self, condition: Conditioning, /) -> Conditioning:
        """Return the conditioning with encoder_hidden_states in place of prompt_embeds."""


def time_embedding(network: PrecomputableNetwork, latent: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
    """Return the time embedding of an evaluation: the precomputed one if there is one, else from `embed_time`."""
    return network.embed_time(latent, tau_B, condition) if condition.temb is None else condition.temb


def text_embedding(network: PrecomputableNetwork, condition: Conditioning) -> tuple[Tensor, Tensor | None]:
    """Return the text that the blocks attend to, (B, S, ...), and its mask: precomputed, or from `embed_text`.

    Raises:
        ValueError: The network takes no text.
    """
    text = network.embed_text(condition) if condition.encoder_hidden_states is None else condition
    if text.encoder_hidden_states is None:
        raise ValueError("this network takes no text")
    return text.encoder_hidden_states, text.mask


class PromptEncoder(Protocol):
    """The encoder of prompts to the network's conditioning."""

    max_tokens: int

    def count(self, prompt: str) -> int:
        """Return the number of tokens of a prompt before truncation to max_tokens.

        Raises:
            ValueError: A prompt that this encoder cannot take.
        """

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """Encode prompts, one row each; each is encoded alone, so that it does not depend on the rest of the batch.

        Args:
            prompts: Texts, or names of classes.
            negative: Whether they are negative prompts; some checkpoints treat an empty negative prompt specially.
        """


class Decoder(Protocol):
    """The decoder of latents to pixels."""

    def __call__(self, latent: Tensor, /) -> Tensor:
        """Return pixels (B, 3, height, width), or (B, frames, 3, height, width) for video, float32 in [0, 1]."""


class ComponentLoader(Protocol):
    """The signature of `load` in an architecture's module."""

    def __call__(self, source: CheckpointSource, kernel: AttentionKernel, **options: Any) -> Components:
        """Load the components of a checkpoint with an attention kernel, and the options that its plug-in declared."""


def networks_in(part: object) -> list[nn.Module]:
    """Return the networks that a prompt encoder or a decoder holds, in its attributes at any depth."""
    if isinstance(part, nn.Module):
        return [part]
    values = vars(part).values() if hasattr(part, "__dict__") else ()
    return [network for value in values for network in networks_in(value)]
