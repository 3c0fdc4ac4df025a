"""What a checkpoint is made of, once loaded: a denoising network, a text encoder and a latent decoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from models.attention import AttentionKernel


@dataclass(frozen=True)
class TextStates:
    """What the network attends to: states_BST float, and mask_BS, true where a token is real."""

    states: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Components:
    """The loaded parts of one checkpoint.

    Args:
        network: (latent_BCHW, tau_B, text_BST, mask_BS) to the raw output (B, out_channels, H, W).
        text: encodes prompts.
        decoder: turns latents into pixels.
        latent_channels: C.
        latent_stride: pixels a latent pixel spans on a side.
        size_multiple: pixels a token of the network spans on a side.
    """

    network: nn.Module
    text: TextEncoder
    decoder: LatentDecoder
    latent_channels: int
    latent_stride: int
    size_multiple: int


class TextEncoder(Protocol):
    """Prompts to states."""

    max_tokens: int

    def count(self, prompt: str) -> int:
        """Tokens of a prompt before it is cut to max_tokens."""

    def __call__(self, prompts: list[str]) -> TextStates:
        """States of shape (B, max_tokens, T)."""


class LatentDecoder(Protocol):
    """Latents to pixels."""

    def __call__(self, latent_BCHW: Tensor) -> Tensor:
        """Pixels (B, 3, stride * H, stride * W), float32 in [0, 1]."""


class ComponentLoader(Protocol):
    """What an architecture's module offers as `load`."""

    def __call__(
        self,
        folder: Path,
        denoiser: str,
        kernel: AttentionKernel,
        dtype: torch.dtype,
        device: torch.device,
        text_tokens: int,
        dummy: bool,
    ) -> Components: ...
