"""What Stable Diffusion and SDXL make of a prompt with CLIP, and what an unconditional model makes of none."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.components import Conditioning
from models.source import Source
from models.text.clip import Clip, load_clip


class ClipPrompts:
    """Stable Diffusion's text: the states after CLIP's last layer and norm, padding included.

    Source: latent diffusion (Rombach et al. 2022), as in diffusers' StableDiffusionPipeline. The second generation's
    OpenCLIP text encoder is published with its last layer cut off, so that one rule serves both.
    """

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self.max_tokens = clip.max_tokens

    def count(self, prompt: str) -> int:
        """Tokens of a prompt before it is cut, start and end included."""
        return self.clip.count(prompt)

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """States (B, max_tokens, T) in the encoder's dtype."""
        return Conditioning(torch.cat([self.clip(prompt).last for prompt in prompts]))


class TwoClipPrompts:
    """SDXL's text: the states before the last layer of two CLIPs side by side, and the second's projected vector.

    Source: Podell et al. 2023, section 2.1, as in diffusers' StableDiffusionXLPipeline.

    Args:
        first: without a projection.
        second: with one.
        zeros_for_empty: an empty negative prompt is zeros, not the encoding of an empty text.
    """

    def __init__(self, first: Clip, second: Clip, zeros_for_empty: bool) -> None:
        self.first = first
        self.second = second
        self.zeros_for_empty = zeros_for_empty
        self.max_tokens = first.max_tokens

    def count(self, prompt: str) -> int:
        """Tokens of a prompt before it is cut, start and end included; the larger of the two tokenizers' counts."""
        return max(self.first.count(prompt), self.second.count(prompt))

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """States (B, max_tokens, T1 + T2) and pooled vectors (B, P) in the encoders' dtype."""
        return Conditioning.stack([self._encode(prompt, negative) for prompt in prompts])

    def _encode(self, prompt: str, negative: bool) -> Conditioning:
        one, two = self.first(prompt), self.second(prompt)
        states = torch.cat([one.penultimate, two.penultimate], dim=-1)
        if negative and not prompt and self.zeros_for_empty:
            return Conditioning(torch.zeros_like(states), pooled=torch.zeros_like(two.pooled))
        return Conditioning(states, pooled=two.pooled)


class Unconditional:
    """The prompt encoder of a model that takes none."""

    max_tokens = 0

    def count(self, prompt: str) -> int:
        """0 of an empty prompt.

        Raises:
            ValueError: any other.
        """
        check_no_prompt(prompt)
        return 0

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """Nothing."""
        return Conditioning()


def check_no_prompt(prompt: str) -> None:
    """Refuses a prompt.

    Raises:
        ValueError: it is not empty.
    """
    if prompt:
        raise ValueError(f"this model takes no prompt, and was asked for {prompt[:40]!r}; use request.prompt=''")


def load_clip_prompts(source: Source) -> ClipPrompts:
    """The prompt encoder of a checkpoint with `text_encoder/` and `tokenizer/`.

    Raises:
        CheckpointError: files that transformers cannot read.
    """
    return ClipPrompts(load_clip(source, "text_encoder", "tokenizer", False, source.text_tokens))


def load_two_clip_prompts(source: Source) -> TwoClipPrompts:
    """The prompt encoder of a checkpoint with two text encoders and two tokenizers.

    Raises:
        CheckpointError: files that transformers cannot read.
    """
    first = load_clip(source, "text_encoder", "tokenizer", False, source.text_tokens)
    second = load_clip(source, "text_encoder_2", "tokenizer_2", True, source.text_tokens)
    return TwoClipPrompts(first, second, bool(source.index().get("force_zeros_for_empty_prompt", True)))
