"""The network: image tokens and text tokens attend to one another as two streams, modulated by time and pooled text.

MMDiT of Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206, section 4), and of 3.5 with RMS norms of queries and
keys. The medium size of 3.5 also has a second attention of the image to itself (MMDiT-X). A checkpoint is
interchangeable with diffusers' `SD3Transformer2DModel`.

Shapes: B batch, H and W latent rows and columns, C latent channels, L image tokens, S text tokens, D width, N entries
of the position table, P outputs per patch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from models.attention import AttentionKernel, sdpa_attention
from models.blocks import BlockStack
from models.components import Conditioning, text_embedding, time_embedding
from models.configs.sd3 import TIME_CHANNELS, SD3Config
from models.layers import (
    FeedForward,
    MLPEmbedder,
    Modulation,
    QKVHeads,
    modulate,
    plain_norm,
    sincos_table_2d,
    timestep_embedding,
    unpatchify,
)


class SD3Block(nn.Module):
    """Two streams with their own weights, joined in one attention.

    Args:
        config: The sizes.
        kernel: The attention.
        dual: Whether the image also attends to itself alone.
        last: Whether the block is the last one, which reads the text but does not update it.
    """

    def __init__(self, config: SD3Config, kernel: AttentionKernel, dual: bool, last: bool) -> None:
        super().__init__()
        width = config.width
        self.kernel = kernel
        self.modulation = Modulation(width, (9 if dual else 6) * width)
        self.text_modulation = Modulation(width, (2 if last else 6) * width)
        self.heads = QKVHeads(width, config.head_channels, config.qk_norm)
        self.text_heads = QKVHeads(width, config.head_channels, config.qk_norm)
        self.to_out = nn.Linear(width, width)
        self.text_to_out = None if last else nn.Linear(width, width)
        self.dual_heads = QKVHeads(width, config.head_channels, config.qk_norm) if dual else None
        self.dual_to_out = nn.Linear(width, width) if dual else None
        self.feed_forward = FeedForward(width)
        self.text_feed_forward = None if last else FeedForward(width)

    def forward(self, x_BLD: Tensor, text_BSD: Tensor, time_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return image and text after the block; the last block returns the text unchanged."""
        x, text = x_BLD, text_BSD
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f, *dual_modulation = _split_modulation(
            self.modulation(time_BD), x
        )
        normed = plain_norm(x)
        image_qkv = self.heads(modulate(normed, shift_a, scale_a))
        t_shift_a, t_scale_a, *text_rest = _split_modulation(self.text_modulation(time_BD), text)
        if not text_rest:
            t_shift_a, t_scale_a = t_scale_a, t_shift_a  # the last block stores scale before shift
        q, k, v = _concat_tokens(self.text_heads(modulate(plain_norm(text), t_shift_a, t_scale_a)), image_qkv)
        text_attended, attended = self.kernel(q, k, v).flatten(2).split([text.shape[1], x.shape[1]], dim=1)
        x = x + gate_a * self.to_out(attended)
        if self.dual_heads is not None and self.dual_to_out is not None:
            shift_d, scale_d, gate_d = dual_modulation
            own = self.kernel(*self.dual_heads(modulate(normed, shift_d, scale_d))).flatten(2)
            x = x + gate_d * self.dual_to_out(own)
        x = x + gate_f * self.feed_forward(modulate(plain_norm(x), shift_f, scale_f))
        if self.text_to_out is None or self.text_feed_forward is None:
            return x, text
        t_gate_a, t_shift_f, t_scale_f, t_gate_f = text_rest
        text = text + t_gate_a * self.text_to_out(text_attended)
        return x, text + t_gate_f * self.text_feed_forward(modulate(plain_norm(text), t_shift_f, t_scale_f))


class SD3(nn.Module):
    """A text-to-image flow: (latent, tau, text, pooled text) to the velocity, a latent.

    Source: Stable Diffusion 3 (arXiv:2403.03206); the weights mean the same as in diffusers' `SD3Transformer2DModel`.

    Args:
        config: The sizes.
        kernel: The attention of every block (models.attention).
    """

    def __init__(self, config: SD3Config, kernel: AttentionKernel = sdpa_attention) -> None:
        super().__init__()
        width, patch, side = config.width, config.patch, config.max_positions
        self.config = config
        self.patch_embed = nn.Conv2d(config.channels, width, kernel_size=patch, stride=patch)
        table_ND = sincos_table_2d(side, side, width, config.sample_size // patch)  # a checkpoint replaces it
        self.register_buffer("positions", table_ND[None].to(torch.get_default_dtype()))
        self.text_in = nn.Linear(config.text_channels, width)
        self.time = MLPEmbedder(TIME_CHANNELS, width)
        self.pooled = MLPEmbedder(config.pooled_channels, width)
        self.blocks = BlockStack(
            [SD3Block(config, kernel, n in config.dual, n == config.depth - 1) for n in range(config.depth)]
        )
        self.head_modulation = Modulation(width, 2 * width)
        self.project_out = nn.Linear(width, patch**2 * config.channels)

    def forward(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Evaluate the network once (models.components.Denoiser); it reads prompt_embeds and pooled.

        Returns:
            The velocity, (B, C, H, W).

        Raises:
            ValueError: No prompt embeddings, no pooled vector, a mask, or a latent larger than the position table.
        """
        if condition.mask is not None:
            raise ValueError("SD3 attends to every text token, padding too; its conditioning must have no mask")
        height, width = (side // self.config.patch for side in latent_BCHW.shape[-2:])
        x_BLD = self.patch_embed(latent_BCHW).flatten(2).transpose(1, 2).contiguous()
        x_BLD = x_BLD + self._center_positions(height, width).to(x_BLD)
        time_BD = time_embedding(self, latent_BCHW, tau_B, condition)
        text_BSD, _ = text_embedding(self, condition)
        x_BLD, text_BSD = self.blocks({"x_BLD": x_BLD, "text_BSD": text_BSD}, {"time_BD": time_BD}).values()
        scale, shift = self.head_modulation(time_BD).chunk(2, dim=-1)
        y_BLP = self.project_out(modulate(plain_norm(x_BLD), shift, scale))
        return unpatchify(y_BLP, height, width, self.config.patch)

    def embed_time(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Return time and pooled text as one vector (models.components.PrecomputableNetwork)."""
        pooled_BP = condition.require_pooled()
        return self.time(timestep_embedding(tau_B, TIME_CHANNELS).to(pooled_BP)) + self.pooled(pooled_BP)

    def embed_text(self, condition: Conditioning) -> Conditioning:
        """Return the conditioning with the text in the network's width (models.components.PrecomputableNetwork)."""
        return replace(
            condition, prompt_embeds=None, encoder_hidden_states=self.text_in(condition.require_prompt_embeds())
        )

    def _center_positions(self, height: int, width: int) -> Tensor:
        """Return the positions of height x width tokens, the centre of the table, (1, L, D)."""
        side = self.config.max_positions
        if max(height, width) > side:
            raise ValueError(f"{height} x {width} tokens; this network has positions for {side} per side")
        top, left = (side - height) // 2, (side - width) // 2
        table_1HWD = self.get_buffer("positions").unflatten(1, (side, side))
        return table_1HWD[:, top : top + height, left : left + width].flatten(1, 2)


def _split_modulation(modulation_B1M: Tensor, x_BLD: Tensor) -> tuple[Tensor, ...]:
    """Return all shifts, scales and gates, (B, 1, D) each."""
    return modulation_B1M.split(x_BLD.shape[-1], dim=-1)


def _concat_tokens(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> list[Tensor]:
    """Return q, k and v of two streams, the first stream's tokens before the second's."""
    return [torch.cat(pair, dim=1) for pair in zip(first, second, strict=True)]
