"""Prompts of Stable Diffusion 3: two CLIP encoders and, if the checkpoint has it, T5.

Source: Stable Diffusion 3 (arXiv:2403.03206, appendix B.3), as in diffusers' StableDiffusion3Pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.checkpoint_source import CheckpointSource
from models.component_rules import has_third_encoder
from models.components import Conditioning
from models.text.clip import ClipEncoder, load_clip
from models.text.t5 import T5Encoder, load_t5


class SD3Prompts:
    """States of both CLIPs and T5, and the pooled vectors of both CLIPs.

    The CLIP states are concatenated in channels and padded to T5's width; T5's states follow them. The pooled vectors
    are concatenated.

    Args:
        clips: The two CLIP encoders.
        t5: The third encoder; None means zeros in its place.
        t5_tokens: The number of T5 tokens, also of the zeros.
        text_channels: The number of channels of a prompt embedding.
    """

    def __init__(
        self, clips: tuple[ClipEncoder, ClipEncoder], t5: T5Encoder | None, t5_tokens: int, text_channels: int
    ) -> None:
        self.clips = clips
        self.t5 = t5
        self.t5_tokens = t5_tokens
        self.text_channels = text_channels
        self.max_tokens = clips[0].max_tokens if t5 is None else t5.max_tokens

    def count(self, prompt: str) -> int:
        """Return the number of tokens of a prompt before truncation, in the encoder with the longest input."""
        return self.clips[0].count(prompt) if self.t5 is None else self.t5.count(prompt)

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """Return prompt embeddings (B, 77 + t5_tokens, T) and pooled vectors (B, P), without a padding mask."""
        return Conditioning.stack([self._encode(prompt) for prompt in prompts])

    def _encode(self, prompt: str) -> Conditioning:
        one, two = (clip(prompt) for clip in self.clips)
        clip_BSC = torch.cat([one.penultimate, two.penultimate], dim=-1)
        clip_BST = F.pad(clip_BSC, (0, self.text_channels - clip_BSC.shape[-1]))
        states_BST = torch.cat([clip_BST, self._t5_states(prompt, clip_BST)], dim=1)
        return Conditioning(states_BST, pooled=torch.cat([one.pooled, two.pooled], dim=-1))

    def _t5_states(self, prompt: str, like: Tensor) -> Tensor:
        if self.t5 is not None:
            return self.t5(prompt)
        return like.new_zeros(1, self.t5_tokens, self.text_channels)


def load_sd3_prompts(source: CheckpointSource, text_channels: int) -> SD3Prompts:
    """Load the prompt encoder of a checkpoint: `text_encoder/` to `text_encoder_3/` and their tokenizers.

    A checkpoint whose model_index.json has no text_encoder_3 runs without it, as in diffusers.

    Returns:
        The prompt encoder.

    Raises:
        CheckpointError: Files that transformers cannot read, or a third encoder that is named but missing.
    """
    clips = (
        load_clip(source, "text_encoder", "tokenizer", projected=True),
        load_clip(source, "text_encoder_2", "tokenizer_2", projected=True),
    )
    t5 = load_t5(source, "text_encoder_3", "tokenizer_3") if has_third_encoder(source) else None
    return SD3Prompts(clips, t5, source.text_tokens, text_channels)
