"""One CLIP text encoder: states of a layer and one pooled vector, as Stable Diffusion, SDXL, SD3 and FLUX use it.

Source: CLIP (Radford et al. 2021), through transformers. Each model's own folder says which layer and which pooled
vector it uses.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from models.checkpoint_source import CheckpointSource
from models.files import CheckpointError
from models.text.load import DummyTokenizer, load_encoder, load_tokenizer

CLIP_DUMMY_TOKENIZER = DummyTokenizer(
    special={"<|startoftext|>": 49406, "<|endoftext|>": 49407},
    roles={"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    template="<|startoftext|> $A <|endoftext|>",
    first_byte=0,
)


@dataclass(frozen=True)
class ClipStates:
    """The encoding of one prompt.

    Args:
        last: The states after the last layer and its norm, (1, S, D).
        penultimate: The states before the last layer, (1, S, D), without the norm.
        pooled: The state at the end-of-text token, projected if the encoder has a projection, (1, P).
    """

    last: Tensor
    penultimate: Tensor
    pooled: Tensor


class ClipEncoder:
    """A CLIP text encoder with its tokenizer; prompts are padded or truncated to `max_tokens`, without a mask."""

    def __init__(
        self,
        encoder: CLIPTextModel | CLIPTextModelWithProjection,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int = 77,
    ) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def count(self, prompt: str) -> int:
        """Return the number of tokens of a prompt before truncation, start and end included."""
        return len(self.tokenizer(prompt).input_ids)

    def __call__(self, prompt: str) -> ClipStates:
        """Return states and pooled vector in the encoder's dtype."""
        tokens = self.tokenizer(
            prompt, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        output = self.encoder(tokens.input_ids.to(self.encoder.device), output_hidden_states=True)
        projected = isinstance(self.encoder, CLIPTextModelWithProjection)
        pooled = output.text_embeds if projected else output.pooler_output
        return ClipStates(output.last_hidden_state, output.hidden_states[-2], pooled)


def load_clip(
    source: CheckpointSource, encoder: str, tokenizer: str, projected: bool, max_tokens: int = 77
) -> ClipEncoder:
    """Load a CLIP encoder from its two folders in a checkpoint.

    Args:
        source: The checkpoint.
        encoder: The text encoder's folder in it.
        tokenizer: The tokenizer's folder in it.
        projected: Whether the pooled vector goes through a projection.
        max_tokens: The number of tokens that a prompt is padded or truncated to.

    Returns:
        The encoder.

    Raises:
        CheckpointError: Files that transformers cannot read, or more tokens than the encoder has positions for.
    """
    model_class = CLIPTextModelWithProjection if projected else CLIPTextModel
    model = load_encoder(source, encoder, model_class, CLIPTextConfig)
    if max_tokens > (limit := model.config.max_position_embeddings):
        raise CheckpointError(f"{source.config_folder(encoder)}: {max_tokens} tokens, but this encoder takes {limit}")
    return ClipEncoder(model, load_tokenizer(source, tokenizer, CLIP_DUMMY_TOKENIZER), max_tokens)
