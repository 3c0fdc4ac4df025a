"""The network: patches of a latent attend to one another and to the text, modulated by the timestep.

It has adaLN-single, cross-attention and sine-cosine positions as in PixArt-alpha (Chen et al. 2023, arXiv:2310.00426,
section 2.3), so that a checkpoint is interchangeable with diffusers' `PixArtTransformer2DModel`.

Shapes: B batch, H and W latent rows and columns, C latent channels, L image tokens, S text tokens, D width, T text
channels, E sinusoids, F a third of the width, P outputs per patch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import AttentionKernel, sdpa_attention
from models.blocks import BlockStack
from models.components import Conditioning, text_embedding, time_embedding
from models.configs.pixart import TIME_CHANNELS, PixArtConfig
from models.layers import (
    Attention,
    FeedForward,
    modulate,
    plain_norm,
    sincos_positions_2d,
    timestep_embedding,
    unpatchify,
)


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; shift, scale and gate from one shared modulation."""

    def __init__(self, config: PixArtConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        width = config.width
        self.norm_eps = config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.self_attention = Attention(width, config.heads, kernel)
        self.cross_attention = Attention(width, config.heads, kernel)
        self.feed_forward = FeedForward(width)

    def forward(self, x_BLD: Tensor, modulation_B6D: Tensor, text_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Return the image tokens after the block, (B, L, D)."""
        table = self.scale_shift_table + modulation_B6D
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.unsqueeze(2).unbind(1)
        x = x_BLD
        x = x + gate_a * self.self_attention(modulate(plain_norm(x, self.norm_eps), shift_a, scale_a))
        x = x + self.cross_attention(x, text_BSD, mask_BS)
        return x + gate_f * self.feed_forward(modulate(plain_norm(x, self.norm_eps), shift_f, scale_f))


class SizeEmbedding(nn.Module):
    """The embedding of the image size: height, width and their ratio, each a third of the network's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.side_in = nn.Linear(TIME_CHANNELS, width // 3)
        self.side_out = nn.Linear(width // 3, width // 3)
        self.ratio_in = nn.Linear(TIME_CHANNELS, width // 3)
        self.ratio_out = nn.Linear(width // 3, width // 3)

    def forward(self, height: int, width: int, like: Tensor) -> Tensor:
        """Return the embedding (1, D) of an image of height x width pixels, with the dtype and device of `like`."""
        sizes = torch.cat([like.new_full((1,), x, dtype=torch.float32) for x in (height, width, height / width)])
        sides_2E, ratio_1E = timestep_embedding(sizes, TIME_CHANNELS).to(like.dtype).split([2, 1])
        sides_2F = self.side_out(F.silu(self.side_in(sides_2E)))
        ratio_1F = self.ratio_out(F.silu(self.ratio_in(ratio_1E)))
        return torch.cat([sides_2F, ratio_1F]).flatten()[None]


class PixArt(nn.Module):
    """A text-conditioned diffusion transformer: (latent, tau, text) to the network's raw output, a latent.

    Source: PixArt-alpha (arXiv:2310.00426); the weights mean the same as in diffusers' `PixArtTransformer2DModel`.

    Args:
        config: The sizes.
        kernel: The attention of every block (models.attention).
    """

    def __init__(self, config: PixArtConfig, kernel: AttentionKernel = sdpa_attention) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.patch_embed = nn.Conv2d(config.in_channels, width, kernel_size=config.patch, stride=config.patch)
        self.time_in = nn.Linear(TIME_CHANNELS, width)
        self.time_out = nn.Linear(width, width)
        self.size = SizeEmbedding(width) if config.size_conditioning else None
        self.time_modulation = nn.Linear(width, 6 * width)
        self.text_in = nn.Linear(config.text_channels, width)
        self.text_out = nn.Linear(width, width)
        self.blocks = BlockStack([PixArtBlock(config, kernel) for _ in range(config.depth)])
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.project_out = nn.Linear(width, config.patch**2 * config.out_channels)

    def forward(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Evaluate the network once (models.components.Denoiser); it reads prompt_embeds and mask.

        Returns:
            The raw output, (B, out_channels, H, W).

        Raises:
            ValueError: No prompt embeddings.
        """
        text_BSD, text_mask_BS = text_embedding(self, condition)
        height, width = (side // self.config.patch for side in latent_BCHW.shape[-2:])
        x_BLD = self.patch_embed(latent_BCHW).flatten(2).transpose(1, 2)
        config, base = self.config, self.config.sample_size // self.config.patch
        x_BLD = x_BLD + sincos_positions_2d(
            height, width, config.width, base, config.position_scale, x_BLD.dtype, x_BLD.device
        )
        temb_B7D = time_embedding(self, latent_BCHW, tau_B, condition)
        modulation_B6D, time_B1D = temb_B7D.split([6, 1], dim=1)
        shared = {"modulation_B6D": modulation_B6D, "text_BSD": text_BSD, "mask_BS": text_mask_BS}
        (x_BLD,) = self.blocks({"x_BLD": x_BLD}, shared).values()
        shift, scale = (self.scale_shift_table + time_B1D).unsqueeze(2).unbind(1)
        y_BLP = self.project_out(modulate(plain_norm(x_BLD), shift, scale))
        return unpatchify(y_BLP, height, width, self.config.patch)

    def embed_time(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Return the modulation that all blocks share, and the time (models.components.PrecomputableNetwork)."""
        sines_BE = timestep_embedding(tau_B, TIME_CHANNELS).to(latent_BCHW.dtype)
        time_BD = self.time_out(F.silu(self.time_in(sines_BE)))
        if self.size is not None:
            pixels = [side * self.config.stride for side in latent_BCHW.shape[-2:]]
            time_BD = time_BD + self.size(*pixels, time_BD)
        modulation_B6D = self.time_modulation(F.silu(time_BD)).unflatten(-1, (6, -1))
        return torch.cat([modulation_B6D, time_BD[:, None]], dim=1)

    def embed_text(self, condition: Conditioning) -> Conditioning:
        """Return the conditioning with the text in the network's width (models.components.PrecomputableNetwork)."""
        text_BSD = self.text_out(F.gelu(self.text_in(condition.require_prompt_embeds()), approximate="tanh"))
        return replace(condition, prompt_embeds=None, encoder_hidden_states=text_BSD)
