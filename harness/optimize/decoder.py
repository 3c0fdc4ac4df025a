"""A picture's decoder with the channels of its convolutions innermost, which is how oneDNN and cuDNN compute them."""

from __future__ import annotations

import torch

from models.components import Decoder
from models.decoders import KLDecoder


def channels_last(decoder: Decoder) -> bool:
    """Lays a decoder's weights out so, in place, and what it computes follows them; false where it has none of them."""
    if not isinstance(decoder, KLDecoder):
        return False
    decoder.vae.to(memory_format=torch.channels_last)
    return True
