"""T5 text encoders: with a padding mask, as PixArt uses them, and without, as SD3 and FLUX do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel

from models.checkpoint_source import CheckpointSource
from models.components import Conditioning
from models.text.load import DummyTokenizer, load_encoder, load_tokenizer

T5_DUMMY_TOKENIZER = DummyTokenizer(
    special={"<pad>": 0, "</s>": 1, "<unk>": 2},
    roles={"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    template="$A </s>",
)


class T5Prompts:
    """A T5 encoder with its tokenizer: each prompt is padded or truncated to `max_tokens`, with a padding mask.

    Prompts are encoded one at a time, so that the states of a prompt do not depend on the rest of the batch.

    Source: PixArt-alpha's use of T5 (arXiv:2310.00426), as in diffusers' PixArtSigmaPipeline with clean_caption=False.

    Args:
        encoder: The text encoder.
        tokenizer: The encoder's tokenizer.
        max_tokens: The number of tokens of every prompt.
        lowercase: Whether prompts are lowercased and stripped, as the captions of PixArt's training were.
    """

    def __init__(
        self, encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int, lowercase: bool = False
    ) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.lowercase = lowercase

    def count(self, prompt: str) -> int:
        """Return the number of tokens of a prompt before truncation, the end-of-text token included."""
        return len(self.tokenizer(self._plain(prompt)).input_ids)

    def _plain(self, prompt: str) -> str:
        return prompt.lower().strip() if self.lowercase else prompt

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """Return prompt embeddings (B, max_tokens, T) in the encoder's dtype, and their mask."""
        return Conditioning.stack([self._encode(prompt) for prompt in prompts])

    def _encode(self, prompt: str) -> Conditioning:
        tokens = self.tokenizer(
            self._plain(prompt), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        ).to(self.encoder.device)
        states = self.encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return Conditioning(states, tokens.attention_mask.bool())


def load_t5_prompts(source: CheckpointSource, lowercase: bool = False) -> T5Prompts:
    """Load the prompt encoder of a checkpoint: `text_encoder/` and `tokenizer/`.

    Args:
        source: The checkpoint.
        lowercase: Whether prompts are lowercased and stripped (T5Prompts).

    Returns:
        The prompt encoder.

    Raises:
        CheckpointError: Files that transformers cannot read.
    """
    tokenizer = load_tokenizer(source, "tokenizer", T5_DUMMY_TOKENIZER)
    encoder = load_encoder(source, "text_encoder", T5EncoderModel, T5Config)
    return T5Prompts(encoder, tokenizer, source.text_tokens, lowercase)


class T5Encoder:
    """A T5 encoder with its tokenizer, one of several of a checkpoint, without a padding mask.

    Source: Stable Diffusion 3 (arXiv:2403.03206) and FLUX.1, in diffusers' pipelines, which pass T5 no mask.
    """

    def __init__(self, encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def count(self, prompt: str) -> int:
        """Return the number of tokens of a prompt before truncation, the end-of-text token included."""
        return len(self.tokenizer(prompt).input_ids)

    def __call__(self, prompt: str) -> Tensor:
        """Return the states of a prompt, padded or truncated, (1, max_tokens, T), in the encoder's dtype."""
        tokens = self.tokenizer(
            prompt, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        states: Tensor = self.encoder(tokens.input_ids.to(self.encoder.device)).last_hidden_state
        return states


def load_t5(source: CheckpointSource, encoder: str, tokenizer: str) -> T5Encoder:
    """Load a T5 encoder from its two folders in a checkpoint.

    Returns:
        The encoder.

    Raises:
        CheckpointError: Files that transformers cannot read.
    """
    loaded = load_tokenizer(source, tokenizer, T5_DUMMY_TOKENIZER)
    return T5Encoder(load_encoder(source, encoder, T5EncoderModel, T5Config), loaded, source.text_tokens)
