"""Decoding one picture on several ranks: each holds a band of rows, and what a layer needs of its neighbours is sent.

Nothing is approximated: convolutions fetch the rows beyond their band (halos), group norms sum their statistics over
ranks, and the attention of the middle block gathers keys and values. The decoder stays diffusers' own; its layers are
replaced from outside.

Shapes: B batch, C channels, h rows of this rank's band, W columns.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from harness.parallel.group import Group


class HaloConv2d(nn.Module):
    """A convolution of stride 1 over a band of rows."""

    def __init__(self, conv: nn.Conv2d, group: Group) -> None:
        super().__init__()
        if conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
            raise ValueError("a band of rows is convolved with stride 1 and zero padding only")
        self.conv = conv
        self.group = group
        self.halo, self.columns = (int(side) for side in conv.padding)

    def forward(self, x_BChW: Tensor) -> Tensor:
        if self.halo:
            before, after = self.group.neighbours(x_BChW[:, :, : self.halo], x_BChW[:, :, -self.halo :])
            x_BChW = torch.cat([before, x_BChW, after], dim=2)
        return F.conv2d(x_BChW, self.conv.weight, self.conv.bias, padding=(0, self.columns), groups=self.conv.groups)


class BandGroupNorm(nn.Module):
    """A group norm whose mean and variance are those of all bands, in float32 and two passes."""

    def __init__(self, norm: nn.GroupNorm, group: Group) -> None:
        super().__init__()
        self.norm = norm
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """x is (B, C, ...), whatever comes behind the channels."""
        grouped = x.float().unflatten(1, (self.norm.num_groups, -1)).flatten(2)
        count = self.group.all_reduce(torch.tensor([float(grouped.shape[-1])], device=x.device))
        mean = self.group.all_reduce(grouped.sum(-1, keepdim=True)) / count
        centred = grouped - mean
        variance = self.group.all_reduce(centred.square().sum(-1, keepdim=True)) / count
        normal = (centred * (variance + self.norm.eps).rsqrt()).view(x.shape)
        if self.norm.affine:
            sides = (1, -1, *[1] * (x.ndim - 2))
            normal = normal * self.norm.weight.float().view(sides) + self.norm.bias.float().view(sides)
        return normal.to(x.dtype)


class BandAttention:
    """The spatial attention of a VAE's middle block, as a processor of diffusers' Attention: queries of this band,
    keys and values of all.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        batch, channels, rows, columns = hidden_states.shape
        x_BCL = hidden_states.flatten(2)
        if attn.group_norm is not None:
            x_BCL = attn.group_norm(x_BCL)
        x_BLC = x_BCL.transpose(1, 2)
        q, k, v = attn.to_q(x_BLC), attn.to_k(x_BLC), attn.to_v(x_BLC)
        k, v = (self.group.all_gather_uneven(side, dim=1) for side in (k, v))
        q_BHLD, k_BHSD, v_BHSD = (side.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for side in (q, k, v))
        out = F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD).transpose(1, 2).flatten(2)
        out = attn.to_out[0](out).transpose(1, 2).reshape(batch, channels, rows, columns)
        return (out + hidden_states if attn.residual_connection else out) / attn.rescale_output_factor


def deal_rows(decoder: nn.Module, group: Group) -> None:
    """Makes every layer of a decoder work on a band of rows, in place."""
    for name, module in list(decoder.named_modules()):
        owner, _, leaf = name.rpartition(".")
        if isinstance(module, nn.Conv2d):
            setattr(decoder.get_submodule(owner), leaf, HaloConv2d(module, group))
        elif isinstance(module, nn.GroupNorm):
            setattr(decoder.get_submodule(owner), leaf, BandGroupNorm(module, group))
        elif isinstance(module, Attention):
            module.set_processor(BandAttention(group))


def band(x: Tensor, group: Group) -> Tensor:
    """This rank's rows of (..., H, W).

    Raises:
        ValueError: fewer rows than ranks.
    """
    if x.shape[-2] < group.size:
        raise ValueError(f"{x.shape[-2]} latent rows cannot be dealt over {group.size} ranks; ask for a higher picture")
    return x.tensor_split(group.size, dim=-2)[group.index]
