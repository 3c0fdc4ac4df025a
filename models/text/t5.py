"""T5 text encoders: with their padding masked, as PixArt uses them, and without, as SD3 and FLUX do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel

from models.components import Conditioning
from models.source import Source
from models.text.load import StandIn, load_encoder, load_tokenizer

T5_STAND_IN = StandIn(
    special={"<pad>": 0, "</s>": 1, "<unk>": 2},
    roles={"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    template="$A </s>",
)


class T5Prompts:
    """A T5 encoder with its tokenizer: each prompt padded or cut to `max_tokens`, padding masked.

    Prompts are encoded one at a time, so that a state does not depend on its neighbours in a batch.

    Args:
        encoder: the text encoder.
        tokenizer: its tokenizer.
        max_tokens: tokens of every prompt.
        lowercase: prompts are told in lower case, without blanks around them, as the captions of PixArt's training.

    Source: PixArt-alpha's use of T5 (arXiv:2310.00426), as in diffusers' PixArtSigmaPipeline with clean_caption=False.
    """

    def __init__(
        self, encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int, lowercase: bool = False
    ) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.lowercase = lowercase

    def count(self, prompt: str) -> int:
        """Tokens of a prompt before it is cut, the end-of-text token included."""
        return len(self.tokenizer(self._plain(prompt)).input_ids)

    def _plain(self, prompt: str) -> str:
        return prompt.lower().strip() if self.lowercase else prompt

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """States (B, max_tokens, T) in the encoder's dtype, and their mask."""
        return Conditioning.stack([self._encode(prompt) for prompt in prompts])

    def _encode(self, prompt: str) -> Conditioning:
        tokens = self.tokenizer(
            self._plain(prompt), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        ).to(self.encoder.device)
        states = self.encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return Conditioning(states, tokens.attention_mask.bool())


def load_t5_prompts(source: Source, lowercase: bool = False) -> T5Prompts:
    """The prompt encoder of a checkpoint with `text_encoder/` and `tokenizer/`; `lowercase` as in T5Prompts.

    Raises:
        CheckpointError: files that transformers cannot read.
    """
    tokenizer = load_tokenizer(source, "tokenizer", T5_STAND_IN)
    encoder = load_encoder(source, "text_encoder", T5EncoderModel, T5Config)
    return T5Prompts(encoder, tokenizer, source.text_tokens, lowercase)


class T5:
    """A T5 encoder with its tokenizer, one of several of a checkpoint; padding is not masked.

    Source: Stable Diffusion 3 (arXiv:2403.03206) and FLUX.1, in diffusers' pipelines, which tell T5 no mask.
    """

    def __init__(self, encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def count(self, prompt: str) -> int:
        """Tokens of a prompt before it is cut, the end-of-text token included."""
        return len(self.tokenizer(prompt).input_ids)

    def __call__(self, prompt: str) -> Tensor:
        """States of a prompt padded or cut to max_tokens, (1, max_tokens, T), in the encoder's dtype."""
        tokens = self.tokenizer(
            prompt, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        states: Tensor = self.encoder(tokens.input_ids.to(self.encoder.device)).last_hidden_state
        return states


def load_t5(source: Source, encoder: str, tokenizer: str) -> T5:
    """The T5 encoder of a checkpoint's two folders.

    Raises:
        CheckpointError: files that transformers cannot read.
    """
    found = load_tokenizer(source, tokenizer, T5_STAND_IN)
    return T5(load_encoder(source, encoder, T5EncoderModel, T5Config), found, source.text_tokens)
