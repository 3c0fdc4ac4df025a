"""Wan's prompts: cleaned, encoded by UMT5, and padded with zeros without a mask."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from models.checkpoint_source import CheckpointSource
from models.components import Conditioning
from models.text.load import load_encoder, load_tokenizer
from models.text.t5 import T5_DUMMY_TOKENIZER

SPACE = re.compile(r"[^\S\x1c-\x1f]+")  # Unicode white space without the four separators


def clean(prompt: str) -> str:
    """Return a prompt cleaned as in Wan's own code.

    Broken Unicode is fixed, HTML entities are resolved twice, and runs of white space become one space. ftfy fixes
    Unicode if it is installed, as in diffusers' WanPipeline; the record names its version. It also converts full-width
    characters, such as those of the published negative prompt.
    """
    return SPACE.sub(" ", html.unescape(html.unescape(_fix_unicode(prompt))).strip()).strip()


def _fix_unicode(text: str) -> str:
    try:
        from ftfy import fix_text
    except ImportError:
        return text
    fixed: str = fix_text(text)
    return fixed


class UMT5Prompts:
    """A UMT5 encoder with its tokenizer: prompts are truncated to `max_tokens`, and states padded to that with zeros.

    Prompts are encoded one at a time, so that the states of a prompt do not depend on the rest of the batch.

    Source: Wan 2.1 (arXiv:2503.20314), as in diffusers' WanPipeline.
    """

    def __init__(self, encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def count(self, prompt: str) -> int:
        """Return the number of tokens of a prompt before truncation, the end-of-text token included."""
        return len(self.tokenizer(clean(prompt)).input_ids)

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """Return prompt embeddings (B, max_tokens, T) in the encoder's dtype."""
        return Conditioning.stack([self._encode(prompt) for prompt in prompts])

    def _encode(self, prompt: str) -> Conditioning:
        tokens = self.tokenizer(
            clean(prompt), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        ).to(self.encoder.device)
        states = self.encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        length = int(tokens.attention_mask.sum())
        return Conditioning(F.pad(states[:, :length], (0, 0, 0, self.max_tokens - length)))


def load_umt5_prompts(source: CheckpointSource) -> UMT5Prompts:
    """Load the prompt encoder of a checkpoint: `text_encoder/` and `tokenizer/`.

    Returns:
        The prompt encoder.

    Raises:
        CheckpointError: Files that transformers cannot read.
    """
    tokenizer = load_tokenizer(source, "tokenizer", T5_DUMMY_TOKENIZER)
    return UMT5Prompts(
        load_encoder(source, "text_encoder", UMT5EncoderModel, UMT5Config), tokenizer, source.text_tokens
    )
