"""The network: image tokens and text tokens attend to one another, first as two streams, then as one.

FLUX.1 (Black Forest Labs 2024, github.com/black-forest-labs/flux) is a rectified-flow transformer with rotary
positions. It has double blocks as in Stable Diffusion 3 (arXiv:2403.03206), then single blocks whose attention and
feed-forward run in parallel, as in ViT-22B (arXiv:2302.05442). A checkpoint is interchangeable with diffusers'
`FluxTransformer2DModel`.

Shapes: B batch, H and W latent rows and columns, C latent channels, L image tokens, S text tokens, D width, A attention
heads, E channels per head, F = E / 2 rotary angles, T text channels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import AttentionKernel, sdpa_attention
from models.blocks import BlockStack
from models.components import Conditioning, text_embedding, time_embedding
from models.configs.flux import PATCH, TIME_CHANNELS, FluxConfig
from models.layers import (
    JointBlock,
    MLPEmbedder,
    Modulation,
    QKVHeads,
    cached_tensor,
    modulate,
    plain_norm,
    timestep_embedding,
)

THETA = 10_000.0  # of the rotary positions


class FluxSingleBlock(nn.Module):
    """One stream, text before image; attention and feed-forward read the same tokens, and their sum is added."""

    def __init__(self, config: FluxConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        width = config.width
        self.kernel = kernel
        self.single_modulation = Modulation(width, 3 * width)
        self.heads = QKVHeads(width, config.head_channels)
        self.up = nn.Linear(width, 4 * width)
        self.activation = nn.GELU("tanh")
        self.project_out = nn.Linear(5 * width, width)

    def forward(self, x_BLD: Tensor, time_BD: Tensor, rope_2LF: Tensor) -> Tensor:
        """Return the tokens after the block, (B, S + L, D)."""
        shift, scale, gate = self.single_modulation(time_BD).chunk(3, dim=-1)
        modulated = modulate(plain_norm(x_BLD), shift, scale)
        attended = self.kernel(*self.heads(modulated, rope_2LF)).flatten(2)
        hidden = self.activation(self.up(modulated))
        return x_BLD + gate * self.project_out(torch.cat([attended, hidden], dim=-1))


class Flux(nn.Module):
    """A text-to-image flow: (latent, tau, text, pooled text, guidance scale) to the velocity, a latent.

    Source: FLUX.1; the weights mean the same as in diffusers' `FluxTransformer2DModel`.

    Args:
        config: The sizes.
        kernel: The attention of every block (models.attention).
    """

    def __init__(self, config: FluxConfig, kernel: AttentionKernel = sdpa_attention) -> None:
        super().__init__()
        width, patch_channels = config.width, PATCH**2 * config.channels
        self.config = config
        self.image_in = nn.Linear(patch_channels, width)
        self.text_in = nn.Linear(config.text_channels, width)
        self.time = MLPEmbedder(TIME_CHANNELS, width)
        self.guidance = MLPEmbedder(TIME_CHANNELS, width) if config.guidance else None
        self.pooled = MLPEmbedder(config.pooled_channels, width)
        self.blocks = BlockStack([JointBlock(config.width, config.head_channels, kernel) for _ in range(config.depth)])
        self.single_blocks = BlockStack([FluxSingleBlock(config, kernel) for _ in range(config.single_depth)])
        self.head_modulation = Modulation(width, 2 * width)
        self.project_out = nn.Linear(width, patch_channels)

    def forward(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Evaluate the network once (models.components.Denoiser).

        It reads prompt_embeds, pooled and, if distilled, scale.

        Returns:
            The velocity, (B, C, H, W).

        Raises:
            ValueError: No prompt embeddings, no pooled vector, no scale for a distilled network, or a mask.
        """
        if condition.mask is not None:
            raise ValueError("FLUX attends to every text token, padding too; its conditioning must have no mask")
        height, width = (side // PATCH for side in latent_BCHW.shape[-2:])
        text_BSD, _ = text_embedding(self, condition)
        time_BD = time_embedding(self, latent_BCHW, tau_B, condition)
        x_BLD = self.image_in(F.pixel_unshuffle(latent_BCHW, PATCH).flatten(2).transpose(1, 2))
        text_tokens = text_BSD.shape[1]
        rope_2LF = rotary_positions(text_tokens, height, width, self.config.axes, latent_BCHW.device)
        shared = {"time_BD": time_BD, "rope_2LF": rope_2LF[:, text_tokens:]}
        x_BLD, text_BSD = self.blocks({"x_BLD": x_BLD, "text_BSD": text_BSD}, shared).values()
        x_BLD = torch.cat([text_BSD, x_BLD], dim=1)
        (x_BLD,) = self.single_blocks({"x_BLD": x_BLD}, {"time_BD": time_BD, "rope_2LF": rope_2LF}).values()
        scale, shift = self.head_modulation(time_BD).chunk(2, dim=-1)
        y_BLP = self.project_out(modulate(plain_norm(x_BLD[:, text_tokens:]), shift, scale))
        return F.pixel_shuffle(y_BLP.transpose(1, 2).unflatten(2, (height, width)), PATCH)

    def embed_time(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Return time, guidance scale and pooled text as one vector (models.components.PrecomputableNetwork).

        In bfloat16 diffusers rounds tau and the scale to 8 bits before it takes their sines. Here both are float32 up
        to the sines, so that close times stay apart.

        Raises:
            ValueError: A distilled network without a guidance scale.
        """
        pooled_BP = condition.require_pooled()
        time_BD = self.time(timestep_embedding(tau_B, TIME_CHANNELS).to(pooled_BP))
        if self.guidance is not None:
            if condition.scale is None:
                raise ValueError("this network needs the guidance scale, but its conditioning has none")
            time_BD = time_BD + self.guidance(timestep_embedding(1000 * condition.scale, TIME_CHANNELS).to(pooled_BP))
        return time_BD + self.pooled(pooled_BP)

    def embed_text(self, condition: Conditioning) -> Conditioning:
        """Return the conditioning with the text in the network's width (models.components.PrecomputableNetwork)."""
        return replace(
            condition, prompt_embeds=None, encoder_hidden_states=self.text_in(condition.require_prompt_embeds())
        )


@cached_tensor
def rotary_positions(
    text_tokens: int, height: int, width: int, axes: tuple[int, int, int], device: torch.device
) -> Tensor:
    """Return cosines and sines of all tokens' rotary angles, text first: (2, S + height * width, E / 2) float32.

    The channels of the first axis do not rotate, those of the second rotate with the row, those of the third with the
    column. The text is at (0, 0). Source: RoFormer (arXiv:2104.09864) in three axes, as in FLUX.1; angles in float64.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions_L = (torch.zeros(height * width), rows.flatten(), columns.flatten())
    angles = [
        torch.outer(position.double(), THETA ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels))
        for position, channels in zip(positions_L, axes, strict=True)
    ]
    angles_LF = F.pad(torch.cat(angles, dim=-1), (0, 0, text_tokens, 0))
    return torch.stack([angles_LF.cos(), angles_LF.sin()]).float().to(device)
