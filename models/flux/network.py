"""The network: a picture's tokens and a text's attend to one another, first as two streams, then as one.

FLUX.1 (Black Forest Labs 2024, github.com/black-forest-labs/flux): a rectified-flow transformer of double blocks, as
in Stable Diffusion 3 (arXiv:2403.03206), and of single blocks whose attention and feed-forward run side by side, as in
ViT-22B (arXiv:2302.05442), with rotary positions; so that a checkpoint is interchangeable with diffusers'
`FluxTransformer2DModel`.

Shapes: B batch, H and W latent rows and columns, C latent channels, L image tokens, S text tokens, D width, A attention
heads, E channels a head, F = E / 2 rotary angles, T text channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import AttentionKernel, sdpa_attention
from models.components import Conditioning, text_of, told_of
from models.layers import Embedder, Heads, JointBlock, Modulation, kept, modulate, plain_norm, timestep_embedding

TIME_CHANNELS = 256
PATCH = 2  # a token is PATCH x PATCH latent pixels
THETA = 10_000.0  # of the rotary positions


@dataclass(frozen=True)
class FluxConfig:
    """The sizes of one network.

    Args:
        depth: double blocks.
        single_depth: single blocks.
        heads: attention heads; the width is heads * head_channels.
        head_channels: channels a head.
        channels: latent channels, in and out.
        text_channels: channels of a text state.
        pooled_channels: channels of the pooled text vector.
        axes: channels of a head that turn with the text's axis (whose positions are all 0), the row and the column.
        guidance: the network is distilled, and told the guidance scale.
    """

    depth: int = 19
    single_depth: int = 38
    heads: int = 24
    head_channels: int = 128
    channels: int = 16
    text_channels: int = 4096
    pooled_channels: int = 768
    axes: tuple[int, int, int] = (16, 56, 56)
    guidance: bool = False

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_channels


class SingleBlock(nn.Module):
    """One stream, text before picture; attention and feed-forward of the same tokens, added as one."""

    def __init__(self, config: FluxConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        width = config.width
        self.kernel = kernel
        self.single_modulation = Modulation(width, 3 * width)
        self.heads = Heads(width, config.head_channels)
        self.up = nn.Linear(width, 4 * width)
        self.activation = nn.GELU("tanh")
        self.project_out = nn.Linear(5 * width, width)

    def forward(self, x_BLD: Tensor, time_BD: Tensor, rope_2LF: Tensor) -> Tensor:
        shift, scale, gate = self.single_modulation(time_BD).chunk(3, dim=-1)
        told = modulate(plain_norm(x_BLD), shift, scale)
        seen = self.kernel(*self.heads(told, rope_2LF)).flatten(2)
        fed = self.activation(self.up(told))
        return x_BLD + gate * self.project_out(torch.cat([seen, fed], dim=-1))


class Flux(nn.Module):
    """A text-to-image flow: (latent, tau, text, pooled text, guidance scale) to the velocity, a latent.

    Args:
        config: the sizes.
        kernel: the attention of every block (models.attention).

    Source: FLUX.1; the weights' meaning is that of diffusers' `FluxTransformer2DModel`.
    """

    def __init__(self, config: FluxConfig, kernel: AttentionKernel = sdpa_attention) -> None:
        super().__init__()
        width, patch_channels = config.width, PATCH**2 * config.channels
        self.config = config
        self.image_in = nn.Linear(patch_channels, width)
        self.text_in = nn.Linear(config.text_channels, width)
        self.time = Embedder(TIME_CHANNELS, width)
        self.guidance = Embedder(TIME_CHANNELS, width) if config.guidance else None
        self.pooled = Embedder(config.pooled_channels, width)
        self.blocks = nn.ModuleList(
            [JointBlock(config.width, config.head_channels, kernel) for _ in range(config.depth)]
        )
        self.single_blocks = nn.ModuleList([SingleBlock(config, kernel) for _ in range(config.single_depth)])
        self.head_modulation = Modulation(width, 2 * width)
        self.project_out = nn.Linear(width, patch_channels)

    def forward(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """One evaluation (models.components.Denoiser); it reads states, pooled and, where distilled, scale.

        Raises:
            ValueError: no text states, no pooled vector, no scale for a distilled network, or a mask.
        """
        if condition.mask is not None:
            raise ValueError("FLUX attends to every text token, padding too; its conditioning takes no mask")
        height, width = (side // PATCH for side in latent_BCHW.shape[-2:])
        text_BSD, _ = text_of(self, condition)
        time_BD = told_of(self, latent_BCHW, tau_B, condition)
        x_BLD = self.image_in(F.pixel_unshuffle(latent_BCHW, PATCH).flatten(2).transpose(1, 2))
        text_tokens = text_BSD.shape[1]
        rope_2LF = rotary_positions(text_tokens, height, width, self.config.axes, latent_BCHW.device)
        for block in self.blocks:
            x_BLD, text_BSD = block(x_BLD, text_BSD, time_BD, rope_2LF[:, text_tokens:])
        x_BLD = torch.cat([text_BSD, x_BLD], dim=1)
        for block in self.single_blocks:
            x_BLD = block(x_BLD, time_BD, rope_2LF)
        scale, shift = self.head_modulation(time_BD).chunk(2, dim=-1)
        y_BLP = self.project_out(modulate(plain_norm(x_BLD[:, text_tokens:]), shift, scale))
        return F.pixel_shuffle(y_BLP.transpose(1, 2).unflatten(2, (height, width)), PATCH)

    def tell(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Time, guidance scale and pooled text as one vector (models.components.AheadNetwork).

        In bfloat16 diffusers rounds tau and the scale to 8 bits before it takes their sines; here both are float32 up
        to the sines, so that near times stay apart.
        """
        pooled_BP = condition.vector()
        time_BD = self.time(timestep_embedding(tau_B, TIME_CHANNELS).to(pooled_BP))
        if self.guidance is not None:
            if condition.scale is None:
                raise ValueError("this network is told the guidance scale, and its conditioning has none")
            time_BD = time_BD + self.guidance(timestep_embedding(1000 * condition.scale, TIME_CHANNELS).to(pooled_BP))
        return time_BD + self.pooled(pooled_BP)

    def read(self, condition: Conditioning) -> Conditioning:
        """The text in the network's width (models.components.AheadNetwork)."""
        return replace(condition, states=None, context=self.text_in(condition.text()))


@kept
def rotary_positions(
    text_tokens: int, height: int, width: int, axes: tuple[int, int, int], device: torch.device
) -> Tensor:
    """Cosines and sines of every token's rotary angles, text before picture: (2, S + height * width, E / 2) float32.

    The channels of the first axis turn with nothing, those of the second with the row, those of the third with the
    column; the text stands at (0, 0). Source: RoFormer (arXiv:2104.09864) in three axes, as in FLUX.1; angles in
    float64.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places_L = (torch.zeros(height * width), rows.flatten(), columns.flatten())
    angles = [
        torch.outer(place.double(), THETA ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels))
        for place, channels in zip(places_L, axes, strict=True)
    ]
    angles_LF = F.pad(torch.cat(angles, dim=-1), (0, 0, text_tokens, 0))
    return torch.stack([angles_LF.cos(), angles_LF.sin()]).float().to(device)
