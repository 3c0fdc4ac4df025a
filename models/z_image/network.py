"""The network: image and text are refined separately, then attend to one another as one stream of tokens.

Blocks have a norm before and after each branch and tanh gates. Learned tokens pad image and text to a multiple of 32.
Positions are on three axes: a text token's is its number from 1 on, and the image's rows and columns follow the last
text token. Z-Image (arXiv:2511.22699, section 4) is interchangeable with diffusers' `ZImageTransformer2DModel` for
text-to-image generation.

Shapes: B batch, H and W latent rows and columns, C latent channels, L image tokens, S text tokens, J tokens of a stack,
D width, T text channels, A channels of the time embedding, E channels per head, F = E / 2 rotary angles, P outputs per
token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import AttentionKernel, sdpa_attention
from models.blocks import BlockStack
from models.components import Conditioning, text_embedding, time_embedding
from models.configs.z_image import PATCH, TIME_CHANNELS, TIME_HIDDEN, ZImageConfig
from models.layers import (
    Modulation,
    QKVProjection,
    cached_tensor,
    plain_norm,
    rotary_angles,
    rotate,
    timestep_embedding,
    unpatchify,
)

TOKEN_MULTIPLE = 32  # the tokens of image and text are padded to a multiple of it
QK_EPS = 1e-5


class ZImageAttention(QKVProjection):
    """Multi-head attention of a stream to itself, with normalized and rotated queries and keys."""

    def __init__(self, config: ZImageConfig, kernel: AttentionKernel) -> None:
        width = config.width
        super().__init__(width, bias=False)
        self.head_channels = config.head_channels
        self.kernel = kernel
        self.norm_q = nn.RMSNorm(config.head_channels, eps=QK_EPS) if config.qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(config.head_channels, eps=QK_EPS) if config.qk_norm else nn.Identity()
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, x_BJD: Tensor, rope_2BJF: Tensor, mask_BJ: Tensor | None) -> Tensor:
        """Return the attention output, (B, J, D)."""
        q, k, v = (y.unflatten(-1, (-1, self.head_channels)) for y in self.qkv(x_BJD))
        q, k = rotate(self.norm_q(q), rope_2BJF), rotate(self.norm_k(k), rope_2BJF)
        return self.to_out(self.kernel(q, k, v, mask_BJ).flatten(2))


class SwiGLU(nn.Module):
    """The feed-forward down(silu(gate x) * up x) (Shazeer 2020)."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x_BJD: Tensor) -> Tensor:
        """Return the output of the feed-forward, (B, J, D)."""
        return self.down(F.silu(self.gate(x_BJD)) * self.up(x_BJD))


class ZImageBlockBase(nn.Module):
    """The modules of every block: attention and feed-forward, each between two norms."""

    def __init__(self, config: ZImageConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.attention = ZImageAttention(config, kernel)
        self.feed_forward = SwiGLU(config)
        self.attention_norm1 = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention_norm2 = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.ffn_norm1 = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.ffn_norm2 = nn.RMSNorm(config.width, eps=config.norm_eps)


class ZImageTextBlock(ZImageBlockBase):
    """A block over the text alone, without time conditioning."""

    def forward(self, x_BJD: Tensor, rope_2BJF: Tensor, mask_BJ: Tensor | None) -> Tensor:
        """Return the text tokens after the block, (B, J, D)."""
        x = x_BJD + self.attention_norm2(self.attention(self.attention_norm1(x_BJD), rope_2BJF, mask_BJ))
        return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))


class ZImageBlock(ZImageBlockBase):
    """A block with a scale before, and a gate after, attention and feed-forward, both from the time embedding."""

    def __init__(self, config: ZImageConfig, kernel: AttentionKernel) -> None:
        super().__init__(config, kernel)
        self.modulation = Modulation(config.time_width, 4 * config.width, silu=False)

    def forward(self, x_BJD: Tensor, rope_2BJF: Tensor, mask_BJ: Tensor | None, time_BA: Tensor) -> Tensor:
        """Return the tokens after the block, (B, J, D)."""
        scale_a, gate_a, scale_f, gate_f = self.modulation(time_BA).chunk(4, dim=-1)
        attended = self.attention(self.attention_norm1(x_BJD) * (1 + scale_a), rope_2BJF, mask_BJ)
        x = x_BJD + gate_a.tanh() * self.attention_norm2(attended)
        return x + gate_f.tanh() * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * (1 + scale_f)))


class ZImage(nn.Module):
    """A single-stream diffusion transformer: (latent, tau, text) to the velocity of the flow, a latent.

    Source: Z-Image (arXiv:2511.22699); the weights mean the same as in diffusers' `ZImageTransformer2DModel`, whose
    output is the velocity from noise to data: forward() negates it.

    Args:
        config: The sizes.
        kernel: The attention of every block (models.attention).
    """

    def __init__(self, config: ZImageConfig, kernel: AttentionKernel = sdpa_attention) -> None:
        super().__init__()
        width, token_channels = config.width, PATCH**2 * config.latent_channels
        self.config = config
        self.image_in = nn.Linear(token_channels, width)
        self.image_pad = nn.Parameter(torch.zeros(1, width))
        self.time_in = nn.Linear(TIME_CHANNELS, TIME_HIDDEN)
        self.time_out = nn.Linear(TIME_HIDDEN, config.time_width)
        self.text_norm = nn.RMSNorm(config.text_channels, eps=config.norm_eps)
        self.text_in = nn.Linear(config.text_channels, width)
        self.text_pad = nn.Parameter(torch.zeros(1, width))
        self.noise_refiner = BlockStack([ZImageBlock(config, kernel) for _ in range(config.refiner_depth)])
        self.context_refiner = BlockStack([ZImageTextBlock(config, kernel) for _ in range(config.refiner_depth)])
        self.layers = BlockStack([ZImageBlock(config, kernel) for _ in range(config.depth)])
        self.head_modulation = Modulation(config.time_width, width)
        self.project_out = nn.Linear(width, token_channels)

    def forward(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Evaluate the network once (models.components.Denoiser).

        It reads prompt_embeds and mask; the real tokens of a row come first.

        Returns:
            The velocity, (B, C, H, W).

        Raises:
            ValueError: No prompt embeddings.
        """
        height, width = (side // PATCH for side in latent_BCHW.shape[-2:])
        time_BA = time_embedding(self, latent_BCHW, tau_B, condition)
        text_BSD, text_mask_BS = text_embedding(self, condition)
        x_BLD = self.image_in(_patches(latent_BCHW))
        missing = -x_BLD.shape[1] % TOKEN_MULTIPLE
        x_BLD = torch.cat([x_BLD, self.image_pad.expand(len(x_BLD), missing, -1)], dim=1)
        padded = x_BLD.shape[1]
        padded_B = _count_text_tokens(text_BSD, text_mask_BS)
        rope_2BJF = self._rope(height, width, missing, text_BSD.shape[1], padded_B)
        shared = {"rope_2BJF": rope_2BJF[:, :, :padded], "mask_BJ": None, "time_BA": time_BA}
        (x_BLD,) = self.noise_refiner({"x_BJD": x_BLD}, shared).values()
        joint_BJD = torch.cat([x_BLD, text_BSD], dim=1)
        mask_BJ = None if text_mask_BS is None else F.pad(text_mask_BS, (padded, 0), value=True)
        shared = {"rope_2BJF": rope_2BJF, "mask_BJ": mask_BJ, "time_BA": time_BA}
        (joint_BJD,) = self.layers({"x_BJD": joint_BJD}, shared).values()
        y_BLP = self.project_out(plain_norm(joint_BJD[:, : height * width]) * (1 + self.head_modulation(time_BA)))
        return -unpatchify(y_BLP, height, width, PATCH)

    def embed_time(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Return the time as a vector (models.components.PrecomputableNetwork)."""
        # 1 - sigma, rounded as in diffusers
        time_B = (1000 - tau_B) / 1000 * self.config.time_scale
        sines_BC = timestep_embedding(time_B, TIME_CHANNELS).to(latent_BCHW.dtype)
        return self.time_out(F.silu(self.time_in(sines_BC)))

    def embed_text(self, condition: Conditioning) -> Conditioning:
        """Return the conditioning with the text refined alone and padded (models.components.PrecomputableNetwork).

        The mask is true for the tokens that take part, the learned padding tokens up to the next multiple included.
        """
        text_BSD, mask_BS = self._pad_text(condition)
        angles_SF = text_angles(text_BSD.shape[1], self.config.axes, self.config.theta, text_BSD.device)
        rope_2BSF = torch.stack([angles_SF.cos(), angles_SF.sin()])[:, None]
        (text_BSD,) = self.context_refiner({"x_BJD": text_BSD}, {"rope_2BJF": rope_2BSF, "mask_BJ": mask_BS}).values()
        return replace(condition, prompt_embeds=None, encoder_hidden_states=text_BSD, mask=mask_BS)

    def _pad_text(self, condition: Conditioning) -> tuple[Tensor, Tensor | None]:
        """Return the text tokens, padded row by row, (B, S, D), and the mask of those that take part."""
        text_BST, mask_BS = condition.require_prompt_embeds(), condition.mask
        real = text_BST.shape[1]
        missing = -real % TOKEN_MULTIPLE
        embedded = self.text_in(self.text_norm(text_BST))
        text_BSD = torch.cat([embedded, self.text_pad.expand(len(embedded), missing, -1)], dim=1)
        if mask_BS is None:
            return text_BSD, None
        real_B = mask_BS.sum(dim=1)
        padded_B = real_B + -real_B % TOKEN_MULTIPLE
        index_S = torch.arange(real + missing, device=text_BSD.device)
        text_BSD = torch.where((index_S < real_B[:, None])[..., None], text_BSD, self.text_pad)
        return text_BSD, index_S < padded_B[:, None]

    def _rope(self, height: int, width: int, missing: int, longest: int, padded_B: Tensor) -> Tensor:
        """Return cosines and sines of every token's angles, image before text: (2, B, J, E / 2).

        There is one row if all rows of the batch agree. The image follows each row's own text; its padding tokens are
        at the origin.
        """
        axes, theta, device = self.config.axes, self.config.theta, padded_B.device
        grid_LF = grid_angles(height, width, axes, theta, device)
        offset_BF = rotary_angles((padded_B + 1).double(), axes[0], theta)
        text_part, grid_part = offset_BF[:, None].expand(-1, len(grid_LF), -1), grid_LF.expand(len(offset_BF), -1, -1)
        image_BLF = F.pad(torch.cat([text_part, grid_part], dim=-1), (0, 0, 0, missing))
        text_BSF = text_angles(longest, axes, theta, device).expand(len(offset_BF), -1, -1)
        angles_BJF = torch.cat([image_BLF, text_BSF], dim=1)
        return torch.stack([angles_BJF.cos(), angles_BJF.sin()])


@cached_tensor
def text_angles(count: int, axes: tuple[int, int, int], theta: float, device: torch.device) -> Tensor:
    """Return the angles of text tokens at (1, 0, 0), (2, 0, 0) ...: (S, E / 2)."""
    angles_SF = rotary_angles(torch.arange(1, count + 1).double(), axes[0], theta)
    return F.pad(angles_SF, (0, (axes[1] + axes[2]) // 2)).to(device)


@cached_tensor
def grid_angles(height: int, width: int, axes: tuple[int, int, int], theta: float, device: torch.device) -> Tensor:
    """Return the angles of the image's tokens by row and column: (L, (axes[1] + axes[2]) / 2)."""
    rows = rotary_angles(torch.arange(height).double(), axes[1], theta)[:, None].expand(-1, width, -1)
    columns = rotary_angles(torch.arange(width).double(), axes[2], theta)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).to(device)


def _count_text_tokens(text_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Return the number of text tokens that take part, (B,), or (1,) if all do."""
    return torch.full((1,), text_BSD.shape[1], device=text_BSD.device) if mask_BS is None else mask_BS.sum(dim=1)


def _patches(latent_BCHW: Tensor) -> Tensor:
    """Return (B, L, p p C) from (B, C, H, W): a token's inputs are ordered row, column, channel."""
    cells = latent_BCHW.unflatten(-2, (-1, PATCH)).unflatten(-1, (-1, PATCH))
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
