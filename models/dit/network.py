"""The network: patches of a latent attend to one another, modulated by the timestep and the class.

It has adaLN-Zero and sine-cosine positions as in DiT (Peebles and Xie 2022, arXiv:2212.09748, section 3.2), so that a
checkpoint is interchangeable with diffusers' `DiTTransformer2DModel`.

Shapes: B batch, H and W latent rows and columns, C latent channels, L image tokens, D width, E sinusoids of the time, P
outputs per patch.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import AttentionKernel, sdpa_attention
from models.blocks import BlockStack
from models.components import Conditioning, time_embedding
from models.configs.dit import TIME_CHANNELS, DiTConfig
from models.layers import (
    Attention,
    FeedForward,
    Modulation,
    modulate,
    plain_norm,
    sincos_positions_2d,
    timestep_embedding,
    unpatchify,
)


class ClassTimeEmbedding(nn.Module):
    """The sum of an embedding of the time and one of the class; every block has its own, as published."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.time_in = nn.Linear(TIME_CHANNELS, width)
        self.time_out = nn.Linear(width, width)
        self.classes = nn.Embedding(config.classes + 1, width)

    def forward(self, time_BE: Tensor, labels_B: Tensor) -> Tensor:
        """Return the embedding, (B, D)."""
        return self.time_out(F.silu(self.time_in(time_BE))) + self.classes(labels_B)


class DiTBlock(nn.Module):
    """Self-attention and feed-forward; shift, scale and gate of both come from the time and the class."""

    def __init__(self, config: DiTConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        width = config.width
        self.norm_eps = config.norm_eps
        self.condition = ClassTimeEmbedding(config)
        self.modulation = Modulation(width, 6 * width)
        self.self_attention = Attention(width, config.heads, kernel)
        self.feed_forward = FeedForward(width)

    def forward(self, x_BLD: Tensor, time_BE: Tensor, labels_B: Tensor) -> Tensor:
        """Return the image tokens after the block, (B, L, D)."""
        modulation_B1M = self.modulation(self.condition(time_BE, labels_B))
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation_B1M.chunk(6, dim=-1)
        x = x_BLD
        x = x + gate_a * self.self_attention(modulate(plain_norm(x), shift_a, scale_a))
        return x + gate_f * self.feed_forward(modulate(plain_norm(x, self.norm_eps), shift_f, scale_f))


class DiT(nn.Module):
    """A class-conditional diffusion transformer: (latent, tau, class) to the network's raw output, a latent.

    Source: DiT (arXiv:2212.09748); the weights mean the same as in diffusers' `DiTTransformer2DModel`, which generates
    squares only. Positions interpolate here, as in PixArt, so that it generates images of any shape.

    Args:
        config: The sizes.
        kernel: The attention of every block (models.attention).
    """

    def __init__(self, config: DiTConfig, kernel: AttentionKernel = sdpa_attention) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.patch_embed = nn.Conv2d(config.in_channels, width, kernel_size=config.patch, stride=config.patch)
        self.blocks = BlockStack([DiTBlock(config, kernel) for _ in range(config.depth)])
        self.head_modulation = Modulation(width, 2 * width)
        self.project_out = nn.Linear(width, config.patch**2 * config.out_channels)

    def forward(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Evaluate the network once (models.components.Denoiser); it reads labels.

        Returns:
            The raw output, (B, out_channels, H, W).

        Raises:
            ValueError: No labels.
        """
        labels_B = condition.labels
        if labels_B is None:
            raise ValueError("this network needs class labels, but its conditioning has none")
        height, width = (side // self.config.patch for side in latent_BCHW.shape[-2:])
        x_BLD = self.patch_embed(latent_BCHW).flatten(2).transpose(1, 2)
        base = self.config.sample_size // self.config.patch
        x_BLD = x_BLD + sincos_positions_2d(height, width, self.config.width, base, 1.0, x_BLD.dtype, x_BLD.device)
        time_BE = time_embedding(self, latent_BCHW, tau_B, condition)
        (x_BLD,) = self.blocks({"x_BLD": x_BLD}, {"time_BE": time_BE, "labels_B": labels_B}).values()
        # the head has no embedding of its own
        condition_BD = self.blocks[0].get_submodule("condition")(time_BE, labels_B)
        shift, scale = self.head_modulation(condition_BD).chunk(2, dim=-1)
        y_BLP = self.project_out(modulate(plain_norm(x_BLD), shift, scale))
        return unpatchify(y_BLP, height, width, self.config.patch)

    def embed_time(self, latent_BCHW: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Return the sinusoids of the time (models.components.PrecomputableNetwork)."""
        return timestep_embedding(tau_B, TIME_CHANNELS, freq_shift=1).to(latent_BCHW.dtype)

    def embed_text(self, condition: Conditioning) -> Conditioning:
        """Return the conditioning unchanged: there is no text."""
        return condition
