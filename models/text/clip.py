"""One CLIP text encoder: states of a layer and one pooled vector, as Stable Diffusion, SDXL, SD3 and FLUX use it.

Source: CLIP (Radford et al. 2021), through transformers; which layer and which pooled vector a model reads, its own
folder says.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from models.files import CheckpointError
from models.source import Source
from models.text.load import StandIn, load_encoder, load_tokenizer

CLIP_STAND_IN = StandIn(
    special={"<|startoftext|>": 49406, "<|endoftext|>": 49407},
    roles={"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    template="<|startoftext|> $A <|endoftext|>",
    first_byte=0,
)


@dataclass(frozen=True)
class ClipStates:
    """What one prompt becomes.

    Args:
        last: states after the last layer and its norm, (1, S, D).
        penultimate: states before the last layer, (1, S, D), without the norm.
        pooled: the state at the end-of-text token, projected where the encoder has a projection, (1, P).
    """

    last: Tensor
    penultimate: Tensor
    pooled: Tensor


class Clip:
    """A CLIP text encoder with its tokenizer; each prompt is padded or cut to `max_tokens`, padding is not masked."""

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
        """Tokens of a prompt before it is cut, start and end included."""
        return len(self.tokenizer(prompt).input_ids)

    def __call__(self, prompt: str) -> ClipStates:
        """States and pooled vector in the encoder's dtype."""
        tokens = self.tokenizer(
            prompt, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        found = self.encoder(tokens.input_ids.to(self.encoder.device), output_hidden_states=True)
        projected = isinstance(self.encoder, CLIPTextModelWithProjection)
        pooled = found.text_embeds if projected else found.pooler_output
        return ClipStates(found.last_hidden_state, found.hidden_states[-2], pooled)


def load_clip(source: Source, encoder: str, tokenizer: str, projected: bool, max_tokens: int = 77) -> Clip:
    """The CLIP encoder of a checkpoint's two folders.

    Args:
        source: the checkpoint.
        encoder: the text encoder's folder in it.
        tokenizer: the tokenizer's.
        projected: its pooled vector goes through a projection.
        max_tokens: tokens a prompt is padded or cut to.

    Raises:
        CheckpointError: files that transformers cannot read, or more tokens than the encoder has positions for.
    """
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    model = load_encoder(source, encoder, kind, CLIPTextConfig)
    if max_tokens > (most := model.config.max_position_embeddings):
        raise CheckpointError(f"{source.config_folder(encoder)}: {max_tokens} tokens, but this encoder takes {most}")
    return Clip(model, load_tokenizer(source, tokenizer, CLIP_STAND_IN), max_tokens)
