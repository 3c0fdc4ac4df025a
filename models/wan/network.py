"""The network: patches of a video latent attend to one another and to the text, modulated by the timestep.

Rotary positions are in time, height and width. Wan (Wan Team 2025, arXiv:2503.20314, section 4.2); a checkpoint is
interchangeable with diffusers' `WanTransformer3DModel`. In bfloat16 the time embedding, the modulation, the layer
norms, the rotation and the residual sums are float32, as in training.

Shapes: B batch, C latent channels, F latent frames, H and W latent rows and columns, L video tokens (frame by frame,
row by row), S text tokens, D width, A attention heads, E channels per head, T text channels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import AttentionKernel, sdpa_attention
from models.blocks import BlockStack
from models.components import Conditioning, text_embedding, time_embedding
from models.configs.wan import WanConfig
from models.layers import FeedForward, QKVProjection, cached_tensor, modulate, rotate, timestep_embedding

THETA = 10_000.0  # of the rotary positions


class WanAttention(QKVProjection):
    """Multi-head attention of tokens x_BLD to a context_BSD, or to themselves, with the given kernel.

    Queries and keys have RMS norms over the full width.
    """

    def __init__(self, config: WanConfig, kernel: AttentionKernel) -> None:
        width = config.width
        super().__init__(width)
        self.head_channels = config.head_channels
        self.kernel = kernel
        self.to_out = nn.Linear(width, width)
        self.norm_q = nn.RMSNorm(width, eps=config.eps)
        self.norm_k = nn.RMSNorm(width, eps=config.eps)

    def forward(self, x_BLD: Tensor, context_BSD: Tensor | None = None, rope_2LE: Tensor | None = None) -> Tensor:
        """Return the attention output of x_BLD, (B, L, D)."""
        if context_BSD is None:
            q, k, v = self.qkv(x_BLD)
        else:
            q, k, v = self.to_q(x_BLD), self.to_k(context_BSD), self.to_v(context_BSD)
        heads = (y.unflatten(-1, (-1, self.head_channels)) for y in (self.norm_q(q), self.norm_k(k), v))
        q_BLAE, k_BSAE, v_BSAE = heads
        if rope_2LE is not None:
            q_BLAE, k_BSAE = rotate(q_BLAE, rope_2LE), rotate(k_BSAE, rope_2LE)
        return self.to_out(self.kernel(q_BLAE, k_BSAE, v_BSAE).flatten(2))


class WanBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; shift, scale and gate from one shared modulation."""

    def __init__(self, config: WanConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        width = config.width
        self.eps = config.eps
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)
        self.self_attention = WanAttention(config, kernel)
        self.cross_attention = WanAttention(config, kernel)
        self.cross_norm = nn.LayerNorm(width, eps=config.eps) if config.cross_norm else nn.Identity()
        self.feed_forward = FeedForward(width, config.hidden)

    def forward(self, x_BLD: Tensor, text_BSD: Tensor, modulation_B6D: Tensor, rope_2LE: Tensor) -> Tensor:
        """Return the video tokens after the block, (B, L, D)."""
        table = self.scale_shift_table + modulation_B6D.float()
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.unsqueeze(2).unbind(1)
        x = x_BLD
        modulated = modulate(_norm(x, self.eps), shift_a, scale_a).type_as(x)
        x = (x.float() + self.self_attention(modulated, rope_2LE=rope_2LE) * gate_a).type_as(x)
        x = x + self.cross_attention(self.cross_norm(x.float()).type_as(x), text_BSD)
        modulated = modulate(_norm(x, self.eps), shift_f, scale_f).type_as(x)
        return (x.float() + self.feed_forward(modulated).float() * gate_f).type_as(x)


class Wan(nn.Module):
    """A text-to-video diffusion transformer: (latent, tau, text) to the network's raw output, a latent.

    Source: Wan 2.1 (arXiv:2503.20314); the weights mean the same as in diffusers' `WanTransformer3DModel`.

    Args:
        config: The sizes.
        kernel: The attention of every block (models.attention).
    """

    def __init__(self, config: WanConfig, kernel: AttentionKernel = sdpa_attention) -> None:
        super().__init__()
        width, sides = config.width, (1, config.patch, config.patch)
        self.config = config
        self.patch_embed = nn.Conv3d(config.channels, width, kernel_size=sides, stride=sides)
        self.time_in = nn.Linear(config.time_channels, width)
        self.time_out = nn.Linear(width, width)
        self.time_modulation = nn.Linear(width, 6 * width)
        self.text_in = nn.Linear(config.text_channels, width)
        self.text_out = nn.Linear(width, width)
        self.blocks = BlockStack([WanBlock(config, kernel) for _ in range(config.depth)])
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.project_out = nn.Linear(width, config.patch**2 * config.channels)

    def forward(self, latent_BCFHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Evaluate the network once (models.components.Denoiser); it reads prompt_embeds, which are padded with zeros.

        Returns:
            The raw output, (B, C, F, H, W).

        Raises:
            ValueError: No prompt embeddings, a mask over them, or a video longer or larger than the positions cover.
        """
        if condition.mask is not None:
            raise ValueError("Wan takes text padded with zeros, not a mask")
        config = self.config
        text_BSD, _ = text_embedding(self, condition)
        frames, height, width = latent_BCFHW.shape[2], *(side // config.patch for side in latent_BCFHW.shape[-2:])
        if max(frames, height, width) > config.max_positions:
            raise ValueError(
                f"{frames} x {height} x {width} tokens; this network has positions for {config.max_positions} per side"
            )
        rope_2LE = rope_3d(frames, height, width, config.head_channels, latent_BCFHW.device)
        x_BLD = self.patch_embed(latent_BCFHW).flatten(2).transpose(1, 2).contiguous()
        temb_B7D = time_embedding(self, latent_BCFHW, tau_B, condition)
        modulation_B6D, time_B1D = temb_B7D.split([6, 1], dim=1)
        shared = {"text_BSD": text_BSD, "modulation_B6D": modulation_B6D, "rope_2LE": rope_2LE}
        (x_BLD,) = self.blocks({"x_BLD": x_BLD}, shared).values()
        shift, scale = (self.scale_shift_table + time_B1D).unsqueeze(2).unbind(1)
        y_BLP = self.project_out(modulate(_norm(x_BLD, config.eps), shift, scale).type_as(x_BLD))
        return self._unpatch(y_BLP, frames, height, width)

    def embed_time(self, latent_BCFHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Return the modulation that all blocks share, and the time (models.components.PrecomputableNetwork)."""
        sines_BE = timestep_embedding(tau_B, self.config.time_channels).to(self.time_in.weight.dtype)
        time_BD = self.time_out(F.silu(self.time_in(sines_BE))).type_as(latent_BCFHW)
        modulation_B6D = self.time_modulation(F.silu(time_BD)).unflatten(-1, (6, -1))
        return torch.cat([modulation_B6D, time_BD[:, None]], dim=1)

    def embed_text(self, condition: Conditioning) -> Conditioning:
        """Return the conditioning with the text in the network's width (models.components.PrecomputableNetwork)."""
        text_BSD = self.text_out(F.gelu(self.text_in(condition.require_prompt_embeds()), approximate="tanh"))
        return replace(condition, prompt_embeds=None, encoder_hidden_states=text_BSD)

    def _unpatch(self, y_BLP: Tensor, frames: int, height: int, width: int) -> Tensor:
        """Return (B, C, F, H, W) from (B, L, p p C): a token's outputs are ordered row, column, channel."""
        patch, channels = self.config.patch, self.config.channels
        y = y_BLP.unflatten(1, (frames, height, width)).unflatten(-1, (patch, patch, channels))
        return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(-1, channels, frames, height * patch, width * patch)


@cached_tensor
def rope_3d(frames: int, height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Return cosines and sines of every token's rotary angles: (2, L, channels / 2) float32.

    The last third of a head's channels rotates with the column, the third before it with the row, each of 2 (channels
    // 6) channels. The remaining channels, in front, rotate with the frame.

    Source: RoFormer (Su et al. 2021) in three axes, as in Wan 2.1; angles in float64.
    """
    side = 2 * (channels // 6)
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (frames, height, width)), indexing="ij")
    angles = [
        torch.outer(position.flatten(), THETA ** -(torch.arange(0, part, 2, dtype=torch.float64) / part))
        for position, part in zip(grid, (channels - 2 * side, side, side), strict=True)
    ]
    angles_LE = torch.cat(angles, dim=-1)
    return torch.stack([angles_LE.cos(), angles_LE.sin()]).float().to(device)


def _norm(x_BLD: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x_BLD.float(), x_BLD.shape[-1:], eps=eps)
