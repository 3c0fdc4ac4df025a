"""Wan's prompts: cleaned, encoded by UMT5, and padded with zeros that nothing masks."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from models.components import Conditioning
from models.source import Source
from models.text.load import load_encoder, load_tokenizer
from models.text.t5 import T5_STAND_IN

SPACE = re.compile(r"[^\S\x1c-\x1f]+")  # Unicode's white space, which the four separators are not


def clean(prompt: str) -> str:
    """A prompt as Wan's own code reads it: broken Unicode mended, HTML entities resolved twice, white space made one
    space.

    What mends Unicode is ftfy, where it is installed, as in diffusers' WanPipeline (it also makes full-width marks
    such as those of the published negative prompt plain ones); the record names its version.
    """
    return SPACE.sub(" ", html.unescape(html.unescape(_mended(prompt))).strip()).strip()


def _mended(text: str) -> str:
    try:
        from ftfy import fix_text
    except ImportError:
        return text
    mended: str = fix_text(text)
    return mended


class UMT5Prompts:
    """A UMT5 encoder with its tokenizer: each prompt cut to `max_tokens`, its states padded to them with zeros.

    Prompts are encoded one at a time, so that a state does not depend on its neighbours in a batch.

    Source: Wan 2.1 (arXiv:2503.20314), as in diffusers' WanPipeline.
    """

    def __init__(self, encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def count(self, prompt: str) -> int:
        """Tokens of a prompt before it is cut, the end-of-text token included."""
        return len(self.tokenizer(clean(prompt)).input_ids)

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """States (B, max_tokens, T) in the encoder's dtype."""
        return Conditioning.stack([self._encode(prompt) for prompt in prompts])

    def _encode(self, prompt: str) -> Conditioning:
        tokens = self.tokenizer(
            clean(prompt), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        ).to(self.encoder.device)
        states = self.encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        length = int(tokens.attention_mask.sum())
        return Conditioning(F.pad(states[:, :length], (0, 0, 0, self.max_tokens - length)))


def load_umt5_prompts(source: Source) -> UMT5Prompts:
    """The prompt encoder of a checkpoint with `text_encoder/` and `tokenizer/`.

    Raises:
        CheckpointError: files that transformers cannot read.
    """
    tokenizer = load_tokenizer(source, "tokenizer", T5_STAND_IN)
    return UMT5Prompts(
        load_encoder(source, "text_encoder", UMT5EncoderModel, UMT5Config), tokenizer, source.text_tokens
    )
