"""Loading of one text encoder and one tokenizer: a checkpoint's own, or a dummy tokenizer with random weights."""

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

from models.checkpoint import check_loading_info
from models.checkpoint_source import CheckpointSource
from models.files import CheckpointError, StoredTensor, list_tensors
from models.lora import Update, lora_updates, merge_updates
from models.meta_init import build_empty, fill_dummy
from models.tensors import read_stored

M = TypeVar("M", bound=PreTrainedModel)


@dataclass(frozen=True)
class DummyTokenizer:
    """A byte-level tokenizer for random weights, in place of a published one.

    It makes one token per byte; the special tokens have their published ids.

    Args:
        special: The id of each special token in the text encoder's vocabulary, by name.
        roles: The special token of each transformers role (`pad_token`, `eos_token`, `bos_token`, `unk_token`).
        template: The text with its surrounding tokens, in the format of tokenizers' TemplateProcessing (`$A <eos>`).
        first_byte: The id of byte 0; the ids of the other bytes follow.
        padding_side: Either right or left.
        chat_template: The Jinja text, if prompts go through a chat template.
        extra: Further keyword arguments of the tokenizer.
    """

    special: Mapping[str, int]
    roles: Mapping[str, str]
    template: str = "$A"
    first_byte: int = 3
    padding_side: str = "right"
    chat_template: str | None = None
    extra: Mapping[str, object] = field(default_factory=dict)

    def build(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer."""
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


def load_tokenizer(
    source: CheckpointSource, component: str, dummy_tokenizer: DummyTokenizer | None = None
) -> PreTrainedTokenizerBase:
    """Load the checkpoint's tokenizer; for random weights without one, build the dummy tokenizer.

    Returns:
        The tokenizer.

    Raises:
        CheckpointError: No tokenizer, or files that transformers cannot read.
    """
    folder = source.config_folder(component)
    if source.dummy and dummy_tokenizer is not None and not folder.is_dir():
        return dummy_tokenizer.build()
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no tokenizer here; copy the checkpoint's {component}/ folder")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({_first_line(error)})") from error


def load_encoder(
    source: CheckpointSource, component: str, model_class: type[M], config_class: type[PreTrainedConfig]
) -> M:
    """Load a text encoder in its dtype, on its device, in evaluation mode.

    Args:
        source: The checkpoint.
        component: The encoder's folder in the checkpoint.
        model_class: The encoder's class in transformers.
        config_class: The class of its configuration.

    Returns:
        The encoder, without gradients.

    Raises:
        CheckpointError: Files that transformers cannot read, or weights that do not fit.
    """
    transformers_logging.disable_progress_bar()  # a rank's log is a file, where a progress bar is noise
    folder, dtype, started = source.config_folder(component), source.dtype_of(component), time.perf_counter()
    updates: Mapping[str, Sequence[Update]] = {}
    bytes_read = 0
    try:
        config = config_class.from_pretrained(folder, local_files_only=True)
        if source.dummy:
            encoder = build_empty(lambda: model_class(config), dtype, source.device_of(component))
            fill_dummy(encoder)
        else:
            updates = lora_updates(source, component)
            stored = list_tensors(source.weights(component))
            encoder = _load_encoder_weights(model_class, config, source, component, stored, updates)
            bytes_read = sum(tensor.end - tensor.start for tensor in stored.values())
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: the text encoder cannot be read ({_first_line(error)})") from error
    encoder = encoder.to(source.device_of(component)).requires_grad_(False).eval()
    source.record(component, encoder, started, len(updates), bytes_read)
    return encoder


def _load_encoder_weights(
    model_class: type[M],
    config: PreTrainedConfig,
    source: CheckpointSource,
    component: str,
    stored: Mapping[str, StoredTensor],
    updates: Mapping[str, Sequence[Update]],
) -> M:
    """Return an encoder with the checkpoint's weights; transformers maps their names and selects what stays float32."""
    dtype = source.dtype_of(component)
    read_dtype = None if model_class._keep_in_fp32_modules_strict else dtype
    encoder, found = model_class.from_pretrained(
        None,
        config=config,
        state_dict={name: LazyTensor(tensor, read_dtype, updates.get(name, ())) for name, tensor in stored.items()},
        dtype=dtype,
        output_loading_info=True,
    )
    check_loading_info(found, source.path_of(component))
    return encoder


@dataclass(frozen=True)
class LazyTensor:
    """A stored tensor that is read when it is indexed with `[...]`, as a slice of a safetensors file is.

    Args:
        stored: The stored tensor.
        dtype: The dtype to read it in; None for its own.
        updates: The updates to merge into it.
    """

    stored: StoredTensor
    dtype: torch.dtype | None
    updates: Sequence[Update] = ()

    def __getitem__(self, index: EllipsisType) -> Tensor:
        if self.updates:
            return merge_updates(self.stored, self.updates)
        return read_stored(self.stored, self.dtype)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
