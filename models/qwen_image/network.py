"""The network: text and image, each with its own weights, attend to one another in every block.

It has double-stream blocks modulated by the timestep. Positions are on three axes (frame, row, column), with the image
centred and the text on the diagonal behind it: Qwen-Image (Wu et al. 2025, arXiv:2508.02324, sections 2.3 and 2.4). It
is interchangeable with diffusers' `QwenImageTransformer2DModel` for text-to-image generation.

Shapes: B batch, H and W latent rows and columns, C latent channels, L image tokens, S text tokens, J = S + L, D width,
E channels per head, F = E / 2 rotary angles, P outputs per token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import AttentionKernel, sdpa_attention
from models.blocks import BlockStack
from models.components import Conditioning, text_embedding, time_embedding
from models.configs.qwen_image import PATCH, TIME_CHANNELS, QwenImageConfig
from models.layers import (
    JointBlock,
    MLPEmbedder,
    Modulation,
    cached_tensor,
    modulate,
    plain_norm,
    rotary_angles,
    timestep_embedding,
)

THETA = 10_000.0  # of the rotary positions


class QwenImage(nn.Module):
    """A double-stream diffusion transformer: (latent, tau, text) to the velocity of the flow, a latent.

    Source: Qwen-Image (arXiv:2508.02324); the weights mean the same as in diffusers' `QwenImageTransformer2DModel`.

    Args:
        config: The sizes.
        kernel: The attention of every block (models.attention).
    """

    def __init__(self, config: QwenImageConfig, kernel: AttentionKernel = sdpa_attention) -> None:
        super().__init__()
        width, token_channels = config.width, PATCH**2 * config.latent_channels
        self.config = config
        self.image_in = nn.Linear(token_channels, width)
        self.time = MLPEmbedder(TIME_CHANNELS, width)
        self.text_norm = nn.RMSNorm(config.text_channels, eps=1e-6)
        self.text_in = nn.Linear(config.text_channels, width)
        self.blocks = BlockStack([JointBlock(config.width, config.head_channels, kernel) for _ in range(config.depth)])
        self.head_modulation = Modulation(width, 2 * width)
        self.project_out = nn.Linear(width, token_channels)

    def forward(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Evaluate the network once (models.components.Denoiser); it reads prompt_embeds and mask.

        Returns:
            The velocity, (B, C, H, W).

        Raises:
            ValueError: No prompt embeddings.
        """
        height, width = (side // PATCH for side in latent_BCHW.shape[-2:])
        text_BSD, mask_BS = text_embedding(self, condition)
        x_BLD = self.image_in(F.pixel_unshuffle(latent_BCHW, PATCH).flatten(2).transpose(1, 2))
        time_BD = time_embedding(self, latent_BCHW, tau_B, condition)
        axes, device = self.config.axes, latent_BCHW.device
        rope_2LF = image_rope(height, width, axes, device)
        text_rope_2SF = text_rope(max(height // 2, width // 2), text_BSD.shape[1], axes, device)
        shared = {"time_BD": time_BD, "rope_2LF": rope_2LF, "text_rope_2SF": text_rope_2SF, "mask_BS": mask_BS}
        x_BLD, text_BSD = self.blocks({"x_BLD": x_BLD, "text_BSD": text_BSD}, shared).values()
        scale, shift = self.head_modulation(time_BD).chunk(2, dim=-1)
        y_BLP = self.project_out(modulate(plain_norm(x_BLD), shift, scale))
        return F.pixel_shuffle(y_BLP.transpose(1, 2).unflatten(2, (height, width)), PATCH)

    def embed_time(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Return the time as a vector (models.components.PrecomputableNetwork)."""
        # rounded as in diffusers in float32; in bfloat16 diffusers also rounds tau to 8 bits, which is not done here
        return self.time(timestep_embedding(tau_B / 1000, TIME_CHANNELS, scale=1000.0).to(latent_BCHW.dtype))

    def embed_text(self, condition: Conditioning) -> Conditioning:
        """Return the conditioning with the text in the network's width (models.components.PrecomputableNetwork)."""
        return replace(
            condition,
            prompt_embeds=None,
            encoder_hidden_states=self.text_in(self.text_norm(condition.require_prompt_embeds())),
        )


@cached_tensor
def image_rope(height: int, width: int, axes: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return cosines and sines of the image's angles, (2, L, E / 2): frame 0, rows and columns centred at 0."""
    frame = torch.zeros(1, 1, axes[0] // 2)
    rows = rotary_angles(torch.arange(height).float() - (height + 1) // 2, axes[1], THETA)[:, None]
    columns = rotary_angles(torch.arange(width).float() - (width + 1) // 2, axes[2], THETA)[None]
    angles_LF = torch.cat([part.expand(height, width, -1) for part in (frame, rows, columns)], dim=-1).flatten(0, 1)
    return torch.stack([angles_LF.cos(), angles_LF.sin()]).to(device)


@cached_tensor
def text_rope(first: int, count: int, axes: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return cosines and sines of the text's angles, (2, S, E / 2).

    A token has one position on all axes, after the last row or column.
    """
    positions_S = torch.arange(first, first + count).float()
    angles_SF = torch.cat([rotary_angles(positions_S, channels, THETA) for channels in axes], dim=-1)
    return torch.stack([angles_SF.cos(), angles_SF.sin()]).to(device)
