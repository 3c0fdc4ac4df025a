"""What a checkpoint is made of, once loaded: a denoising network, a prompt encoder and a latent decoder.

Shapes: B samples, S text tokens, T text channels, P pooled channels, C latent channels, F latent frames (video only),
H and W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import AttentionKernel
from models.plan import WHOLE, AheadPlan, ParallelPlan
from models.source import Source


@dataclass(frozen=True)
class Conditioning:
    """What the network is told beside the latent and the time, one row a sample; a network reads what it has use for.

    Args:
        states: token states of the prompt, (B, S, T).
        mask: (B, S), true where a token is real; None where all are.
        pooled: one vector a prompt, (B, P).
        labels: class indices, (B,) int64.
        scale: the guidance scale that a guidance-distilled network is told, (B,) float32.
        told: what the network makes of time and vectors, (B, ...), where it was made beforehand (AheadNetwork).
        context: what it makes of the states, (B, S, ...), likewise; it stands in their place, and mask is then its own.
    """

    states: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    labels: Tensor | None = None
    scale: Tensor | None = None
    told: Tensor | None = None
    context: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Conditioning:
        """The same with states and pooled vector in the network's dtype."""
        return replace(
            self,
            states=None if self.states is None else self.states.to(dtype),
            pooled=None if self.pooled is None else self.pooled.to(dtype),
        )

    def text(self) -> Tensor:
        """The token states, for a network that cannot do without.

        Raises:
            ValueError: there are none.
        """
        if self.states is None:
            raise ValueError("this network needs text states, and its conditioning has none")
        return self.states

    def vector(self) -> Tensor:
        """The pooled vector, for a network that cannot do without.

        Raises:
            ValueError: there is none.
        """
        if self.pooled is None:
            raise ValueError("this network needs a pooled text vector, and its conditioning has none")
        return self.pooled

    @staticmethod
    def stack(parts: Sequence[Conditioning]) -> Conditioning:
        """Rows of several in one batch; states of different lengths are padded at the end, and masked there."""
        parts = _of_one_length(parts)
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Conditioning)}
        return Conditioning(**{name: None if c[0] is None else torch.cat(c) for name, c in columns.items()})


def _of_one_length(parts: Sequence[Conditioning]) -> list[Conditioning]:
    texts = [part.states if part.context is None else part.context for part in parts]
    lengths = [0 if text is None else text.shape[1] for text in texts]
    if len(set(lengths)) == 1 and len({part.mask is None for part in parts}) == 1:
        return list(parts)
    padded = []
    for part, text, length in zip(parts, texts, lengths, strict=True):
        if text is None:
            raise ValueError("samples with and without text states cannot share a batch")
        mask = torch.ones(text.shape[:2], dtype=torch.bool) if part.mask is None else part.mask
        tail = max(lengths) - length
        mask, text = F.pad(mask.to(text.device), (0, tail)), F.pad(text, (0, 0, 0, tail))
        read = {"states": text} if part.context is None else {"context": text}
        padded.append(replace(part, mask=mask, **read))
    return padded


@dataclass(frozen=True)
class LatentSpace:
    """The geometry of the state that is denoised.

    Args:
        channels: C.
        stride: pixels a latent pixel spans on a side.
        frame_stride: for video, frames that a latent frame after the first spans; None for pictures.
    """

    channels: int
    stride: int
    frame_stride: int | None = None

    def shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """(C, H, W), or (C, F, H, W) for video, of a picture or video in pixels and frames."""
        if self.frame_stride is None:
            return (self.channels, height // self.stride, width // self.stride)
        return (self.channels, (frames - 1) // self.frame_stride + 1, height // self.stride, width // self.stride)


@dataclass(frozen=True)
class GuidanceRule:
    """What a checkpoint makes of request.guidance, where the default is classifier-free guidance of the whole output.

    Args:
        embedded: the network is distilled and told the scale (Conditioning.scale); there is no negative branch.
        channels: only so many output channels are guided, from the first; the others are the prompt's. None = all.
        token_norm: every token's guided output is given the norm that the prompt's has there; the side of a token in
            latent pixels. None = it keeps its own.
        possible: there is a prompt to be guided by.
    """

    embedded: bool = False
    channels: int | None = None
    token_norm: int | None = None
    possible: bool = True


CLASSIFIER_FREE = GuidanceRule()


@dataclass(frozen=True)
class Components:
    """The loaded parts of one checkpoint.

    Args:
        network: (latent, tau_B, conditioning) to the raw output, as Denoiser says.
        load_prompts: loads the prompt encoder; called again when it was dropped from memory.
        decoder: turns latents into pixels.
        latent: the geometry of the state.
        size_multiple: pixels a token of the network spans on a side.
        guidance: what it makes of request.guidance.
        plan: how the network may be cut over ranks.
        ahead: what of it can be computed before its evaluations; None where it is no AheadNetwork.
        check_prompt: raises ValueError for a prompt that the model cannot take (no name of a class).
        learned_variance: the network outputs 2 C channels.
        even_sigmas: the published pipeline hands its noise scheduler sigmas from 1 to 1 / n, in place of the
            scheduler's own (FLUX, Qwen-Image and Z-Image do).
        max_side: pixels at which the network's positions end; None where they do not.
        recordable: an evaluation of sizes that came before reads nothing of the CPU's memory, so that what it does on
            a GPU can be recorded and replayed.
    """

    network: nn.Module
    load_prompts: Callable[[], PromptEncoder]
    decoder: Decoder
    latent: LatentSpace
    size_multiple: int
    guidance: GuidanceRule = CLASSIFIER_FREE
    plan: ParallelPlan = WHOLE
    ahead: AheadPlan | None = None
    check_prompt: Callable[[str], None] = lambda prompt: None
    learned_variance: bool = False
    even_sigmas: bool = False
    max_side: int | None = None
    recordable: bool = True


class Denoiser(Protocol):
    """The call of every native network."""

    def __call__(self, latent: Tensor, tau_B: Tensor, condition: Conditioning, /) -> Tensor:
        """One evaluation.

        Args:
            latent: the noisy state, already scaled by c_in, (B, C, H, W) or (B, C, F, H, W), in the network's dtype.
            tau_B: float32, what the noise scheduler tells of the time (1000 t for a flow, the index for DDPM).
            condition: the prompt's side, in the network's dtype.

        Returns:
            The raw output of the same spatial shape, with C channels, or 2 C where it learned a variance too.
        """


class AheadNetwork(Denoiser, Protocol):
    """A network that can be told beforehand what stays the same between evaluations; every transformer here is one."""

    def tell(self, latent: Tensor, tau_B: Tensor, condition: Conditioning, /) -> Tensor:
        """What its blocks are told of time and vectors, (B, ...): Conditioning.told, where no chains go on.

        Args:
            latent: of any number of samples; only their shape and dtype are read.
            tau_B: as in an evaluation.
            condition: as in an evaluation; text is not read.
        """

    def read(self, condition: Conditioning, /) -> Conditioning:
        """The same with context in place of states."""


def told_of(network: AheadNetwork, latent: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
    """What a network's blocks are told in an evaluation: what was made beforehand, or else its own `tell`."""
    return network.tell(latent, tau_B, condition) if condition.told is None else condition.told


def text_of(network: AheadNetwork, condition: Conditioning) -> tuple[Tensor, Tensor | None]:
    """The text that a network's blocks take up, (B, S, ...), and its mask: made beforehand, or by its own `read`."""
    read = network.read(condition) if condition.context is None else condition
    if read.context is None:
        raise ValueError("this network reads no text")
    return read.context, read.mask


class PromptEncoder(Protocol):
    """Prompts to what the network is told of them."""

    max_tokens: int

    def count(self, prompt: str) -> int:
        """Tokens of a prompt before it is cut to max_tokens.

        Raises:
            ValueError: a prompt that this encoder cannot take.
        """

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """One row a prompt, each encoded alone, so that it does not depend on its neighbours.

        Args:
            prompts: texts, or names of classes.
            negative: they are what guidance moves away from; some checkpoints treat an empty one apart.
        """


class Decoder(Protocol):
    """Latents to pixels."""

    def __call__(self, latent: Tensor, /) -> Tensor:
        """Pixels (B, 3, height, width), or (B, frames, 3, height, width) for video, float32 in [0, 1]."""


class ComponentLoader(Protocol):
    """What an architecture's module offers as `load`."""

    def __call__(self, source: Source, kernel: AttentionKernel) -> Components: ...


def networks_in(part: object) -> list[nn.Module]:
    """The networks that a prompt encoder or a decoder holds, in its attributes at any depth."""
    if isinstance(part, nn.Module):
        return [part]
    held = vars(part).values() if hasattr(part, "__dict__") else ()
    return [network for value in held for network in networks_in(value)]
