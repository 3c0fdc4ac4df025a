"""Loading one text encoder and one tokenizer: a checkpoint's own, or stand-ins for work without a download."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TokenizersBackend
from transformers.utils import logging as transformers_logging

from models.checkpoint import refuse_misfits
from models.empty import build_empty, fill_dummy
from models.files import CheckpointError, Stored, tensors_of
from models.lora import LowRank, merged, updates_of
from models.source import Source
from models.tensors import read_stored

M = TypeVar("M", bound=PreTrainedModel)


@dataclass(frozen=True)
class StandIn:
    """A byte-level tokenizer in place of a published one, for random weights: one token a byte, the special tokens with
    their published ids.

    Args:
        special: name of each special token, and its id in the text encoder's vocabulary.
        roles: of transformers (`pad_token`, `eos_token`, `bos_token`, `unk_token`), which of them plays it.
        template: what surrounds a text, in the words of tokenizers' TemplateProcessing (`$A <eos>`).
        first_byte: id of byte 0; those of the other bytes follow.
        padding_side: right or left.
        chat_template: Jinja text, where prompts go through one.
    """

    special: Mapping[str, int]
    roles: Mapping[str, str]
    template: str = "$A"
    first_byte: int = 3
    padding_side: str = "right"
    chat_template: str | None = None
    extra: Mapping[str, object] = field(default_factory=dict)

    def build(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {letter: self.first_byte + n for n, letter in enumerate(letters)} | dict(self.special)
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.TemplateProcessing(
            single=self.template, special_tokens=list(self.special.items())
        )
        return TokenizersBackend(
            tokenizer_object=tokenizer,
            padding_side=self.padding_side,
            chat_template=self.chat_template,
            extra_special_tokens=[name for name in self.special if name not in self.roles.values()],
            **self.roles,
            **self.extra,
        )


def load_tokenizer(source: Source, component: str, stand_in: StandIn | None = None) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; for random weights without one, its stand-in.

    Raises:
        CheckpointError: no tokenizer, or files that transformers cannot read.
    """
    folder = source.config_folder(component)
    if source.dummy and stand_in is not None and not folder.is_dir():
        return stand_in.build()
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no tokenizer here; copy the checkpoint's {component}/ folder")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({_first_line(error)})") from error


def load_encoder(source: Source, component: str, kind: type[M], config_kind: type[PreTrainedConfig]) -> M:
    """A text encoder in its dtype, on its device, in evaluation mode.

    Args:
        source: the checkpoint.
        component: the encoder's folder in it.
        kind: its class in transformers.
        config_kind: that of its configuration.

    Raises:
        CheckpointError: files that transformers cannot read, or weights that do not fit.
    """
    transformers_logging.disable_progress_bar()  # a rank's log is a file
    folder, dtype, began = source.config_folder(component), source.dtype_of(component), time.perf_counter()
    updates: Mapping[str, Sequence[LowRank]] = {}
    read = 0
    try:
        config = config_kind.from_pretrained(folder, local_files_only=True)
        if source.dummy:
            encoder = build_empty(lambda: kind(config), dtype, source.device_of(component))
            fill_dummy(encoder)
        else:
            updates = updates_of(source, component)
            stored = tensors_of(source.weights(component))
            encoder = _filled(kind, config, source, component, stored, updates)
            read = sum(tensor.end - tensor.start for tensor in stored.values())
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: the text encoder cannot be read ({_first_line(error)})") from error
    encoder = encoder.to(source.device_of(component)).requires_grad_(False).eval()
    source.record(component, encoder, began, len(updates), read)
    return encoder


def _filled(
    kind: type[M],
    config: PreTrainedConfig,
    source: Source,
    component: str,
    stored: Mapping[str, Stored],
    updates: Mapping[str, Sequence[LowRank]],
) -> M:
    """An encoder with the checkpoint's weights; transformers maps their names and picks what stays float32."""
    dtype = source.dtype_of(component)
    wanted = None if kind._keep_in_fp32_modules_strict else dtype
    encoder, found = kind.from_pretrained(
        None,
        config=config,
        state_dict={name: Unread(tensor, wanted, updates.get(name, ())) for name, tensor in stored.items()},
        dtype=dtype,
        output_loading_info=True,
    )
    refuse_misfits(found, source.path_of(component))
    return encoder


@dataclass(frozen=True)
class Unread:
    """A stored tensor that is read where `[...]` asks for it, as a slice of a safetensors file is.

    Args:
        stored: where it lies.
        dtype: to read it in; None for its own.
        updates: merged into it first.
    """

    stored: Stored
    dtype: torch.dtype | None
    updates: Sequence[LowRank] = ()

    def __getitem__(self, index: EllipsisType) -> Tensor:
        if self.updates:
            return merged(self.stored, self.updates)
        return read_stored(self.stored, self.dtype)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
