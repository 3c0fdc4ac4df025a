"""Decoding one image or video on several ranks by rows: each decodes a band of rows of every frame.

What a layer needs from other bands is sent. A video can be sharded by latent frames instead (harness.parallel.frames).

Nothing is approximated: convolutions fetch the rows beyond their band (halos), group norms merge their statistics over
ranks, and the attention of the middle block gathers keys and values. Norms over channels, nearest upsampling and
convolutions over time alone need no other rows. The decoders stay diffusers' own (AutoencoderKL, AutoencoderKLWan,
AutoencoderKLQwenImage); their layers are replaced from outside.

Shapes: B batch, C channels, F frames, h rows of this rank's band, W columns, L = h W tokens of a frame on this rank, S
those of all ranks.
"""

from __future__ import annotations

from copy import copy
from typing import TypeAlias

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageAttentionBlock, QwenImageCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d
from torch import Tensor, nn
from torch.nn import functional as F

from harness.config.schema import Decode
from harness.parallel.frames import FramesDecoder
from harness.parallel.group import Group
from models.components import Decoder
from models.decoders import KLDecoder
from models.qwen_image.decoder import QwenImageDecoder
from models.wan.decoder import WanDecoder

RowShardableDecoder: TypeAlias = KLDecoder | WanDecoder | QwenImageDecoder
"""Decoders whose layers can work on a band of rows; any other decodes everything on every rank."""
CAUSAL = (WanCausalConv3d, QwenImageCausalConv3d)
"""Convolutions over rows, columns and earlier frames."""
FRAME_ATTENTION = (WanAttentionBlock, QwenImageAttentionBlock)
"""Attention of one head among the pixels of each frame."""


def parallel_decoder(decoder: Decoder, group: Group, by: Decode = Decode.rows) -> Decoder:
    """Shard the work of a decoder over ranks; latents and pixels are whole on every rank.

    Its layers are replaced in place. At size 1, and if no layer can be sharded (the latents are pixels already), the
    decoder is returned as it is.

    Args:
        decoder: the decoder, written for one device.
        group: the ranks, which all have the same latents.
        by: whether to shard rows or frames.

    Returns:
        The decoder to call.

    Raises:
        ValueError: if frames are to be sharded, and the decoder is one of images.
    """
    if group.size == 1 or not isinstance(decoder, RowShardableDecoder):
        return decoder
    if by is Decode.frames:
        if not isinstance(decoder, WanDecoder):
            raise ValueError("parallel.decode=frames shards a video, and this model generates images; use rows")
        return FramesDecoder(decoder, group)
    shard_rows(decoder.vae.decoder, group)
    return BandDecoder(decoder, group)


class BandDecoder:
    """A decoder sharded over ranks by rows; latents and pixels are whole on every rank.

    Args:
        decoder: the decoder, whose layers work on a band of rows.
        group: the ranks.
    """

    def __init__(self, decoder: Decoder, group: Group) -> None:
        self.decoder = decoder
        self.group = group

    def __call__(self, latent: Tensor) -> Tensor:
        """Decode latents, as models.components.Decoder does.

        Args:
            latent: the whole latents.

        Returns:
            The whole pixels.

        Raises:
            ValueError: if there are fewer latent rows than ranks; on every rank, before any of them sends.
        """
        return self.group.all_gather_uneven(self.decoder(local_rows(latent, self.group)), dim=-2)


def local_rows(x: Tensor, group: Group) -> Tensor:
    """Return the rows of this rank.

    Args:
        x: a tensor (..., H, W).
        group: the ranks.

    Returns:
        The band (..., h, W).

    Raises:
        ValueError: if there are fewer rows than ranks.
    """
    if x.shape[-2] < group.size:
        raise ValueError(f"{x.shape[-2]} latent rows cannot be sharded over {group.size} ranks; request a taller image")
    return x.tensor_split(group.size, dim=-2)[group.index]


def shard_rows(decoder: nn.Module, group: Group) -> None:
    """Replace the layers of a decoder by layers that work on a band of rows, in place.

    Args:
        decoder: the decoder, written for one device.
        group: the ranks.

    Raises:
        ValueError: if a convolution reaches past the neighbouring rows.
    """
    children = [(owner, name, child) for owner in decoder.modules() for name, child in owner.named_children()]
    for owner, name, child in children:
        if isinstance(child, Attention):
            child.set_processor(BandAttention(group))
        elif (layer := _sharded_layer(child, group)) is not None:
            setattr(owner, name, layer)


def _sharded_layer(module: nn.Module, group: Group) -> nn.Module | None:
    """Return the same layer over a band of rows; None if it needs no other rows."""
    if isinstance(module, CAUSAL):
        return HaloConv3d(module, group) if halo_rows(module) else None
    if isinstance(module, nn.Conv2d):
        return HaloConv2d(module, group) if halo_rows(module) else None
    if isinstance(module, nn.GroupNorm):
        return BandGroupNorm(module, group)
    return BandFrameAttention(module, group) if isinstance(module, FRAME_ATTENTION) else None


def halo_rows(conv: nn.Conv2d | WanCausalConv3d | QwenImageCausalConv3d) -> int:
    """Return the rows beyond a band, on each side, that a convolution needs.

    Args:
        conv: the convolution.

    Returns:
        0 or 1.

    Raises:
        ValueError: if it needs more rows, or skips some.
    """
    rows = int(conv._padding[2]) if isinstance(conv, CAUSAL) else int(conv.padding[-2])
    if (conv.kernel_size[-2], conv.stride[-2], conv.dilation[-2]) != (2 * rows + 1, 1, 1) or rows > 1:
        raise ValueError(
            f"a band of rows needs convolutions with kernels of 1 or 3 rows and stride 1; {conv} has others"
        )
    if conv.padding_mode != "zeros":
        raise ValueError(f"a band of rows needs convolutions with zero padding; {conv} has another")
    return rows


def _with_halo(x: Tensor, group: Group) -> Tensor:
    """Return (..., h + 2, W): a row of the band above, the band, a row of the band below; zeros at the ends."""
    before, after = group.exchange_halos(x[..., :1, :], x[..., -1:, :])
    return torch.cat([before, x, after], dim=-2)


class HaloConv2d(nn.Module):
    """A convolution of 3 rows over a band.

    Args:
        conv: the whole convolution.
        group: the ranks.
    """

    def __init__(self, conv: nn.Conv2d, group: Group) -> None:
        super().__init__()
        self.conv = copy(conv)  # with the same weights
        self.conv.padding = (0, int(conv.padding[1]))
        self.group = group

    def forward(self, x_BChW: Tensor) -> Tensor:
        """Convolve this rank's band."""
        output: Tensor = self.conv(_with_halo(x_BChW, self.group))
        return output


class HaloConv3d(nn.Module):
    """A causal convolution of 3 rows over a band of every frame, and over earlier frames that its caller cached.

    Those frames are cached without halos, so that their halos are fetched again.

    Args:
        conv: the whole convolution.
        group: the ranks.
    """

    def __init__(self, conv: WanCausalConv3d | QwenImageCausalConv3d, group: Group) -> None:
        super().__init__()
        self.conv = conv
        self.group = group

    def forward(self, x_BCFhW: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """Convolve this rank's band of the cached frames and of the new ones."""
        left, right, _, _, frames, _ = self.conv._padding
        if cache_x is not None and frames > 0:
            x_BCFhW = torch.cat([cache_x, x_BCFhW], dim=2)
            frames -= cache_x.shape[2]
        x_BCFhW = F.pad(_with_halo(x_BCFhW, self.group), (left, right, 0, 0, frames, 0))
        return self.conv._conv_forward(x_BCFhW, self.conv.weight, self.conv.bias)  # does not pad again


class BandGroupNorm(nn.Module):
    """A group norm whose mean and variance are those of all bands, in float32.

        w_r = n_r / n,    mean = sum_r w_r mean_r,    var = sum_r w_r (var_r + (mean_r - mean)^2)

    over ranks r with n_r numbers in a group; so one collective is enough. Source: Chan, Golub and LeVeque 1979
    ("Updating formulae and a pairwise algorithm for computing sample variances").

    Args:
        norm: the whole norm.
        group: the ranks.
    """

    def __init__(self, norm: nn.GroupNorm, group: Group) -> None:
        super().__init__()
        self.norm = norm
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, ...), whatever dimensions follow the channels."""
        grouped = x.float().unflatten(1, (self.norm.num_groups, -1)).flatten(2)
        var, mean = torch.var_mean(grouped, dim=-1, correction=0)
        count = mean.new_full((1,), float(grouped.shape[-1]))
        gathered = self.group.all_gather(torch.cat([count, mean.flatten(), var.flatten()]))
        weights = (gathered[:, :1] / gathered[:, :1].sum(0))[..., None]
        means, variances = gathered[:, 1:].unflatten(1, (2, *mean.shape)).unbind(1)
        mean = (weights * means).sum(0)
        var = (weights * (variances + (means - mean).square())).sum(0)
        normal = ((grouped - mean[..., None]) * (var + self.norm.eps).rsqrt()[..., None]).view(x.shape)
        if self.norm.affine:
            shape = (1, -1, *[1] * (x.ndim - 2))
            normal = normal * self.norm.weight.float().view(shape) + self.norm.bias.float().view(shape)
        return normal.to(x.dtype)


class BandAttention:
    """The spatial attention of an image VAE over bands, as a processor of diffusers' Attention.

    Queries are those of this band; keys and values are gathered.

    Args:
        group: the ranks.
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
        """Attend from this rank's band, as diffusers' processor does on a whole image."""
        batch, channels, rows, columns = hidden_states.shape
        x_BCL = hidden_states.flatten(2)
        if attn.group_norm is not None:
            x_BCL = attn.group_norm(x_BCL)
        x_BLC = x_BCL.transpose(1, 2)
        q, k, v = (linear(x_BLC).unflatten(-1, (attn.heads, -1)) for linear in (attn.to_q, attn.to_k, attn.to_v))
        out_BLC = _attend(q, k, v, self.group).flatten(2)
        out = attn.to_out[0](out_BLC).transpose(1, 2).reshape(batch, channels, rows, columns)
        return (out + hidden_states if attn.residual_connection else out) / attn.rescale_output_factor


class BandFrameAttention(nn.Module):
    """The attention block of a video VAE over bands: the pixels of a frame attend to all of that frame.

    Args:
        block: the whole block.
        group: the ranks.
    """

    def __init__(self, block: WanAttentionBlock | QwenImageAttentionBlock, group: Group) -> None:
        super().__init__()
        self.block = block
        self.group = group

    def forward(self, x_BCFhW: Tensor) -> Tensor:
        """Attend from this rank's band."""
        block, (batch, _, _, rows, _) = self.block, x_BCFhW.shape
        x_NChW = x_BCFhW.transpose(1, 2).flatten(0, 1)  # N = B F
        qkv_NLHC = block.to_qkv(block.norm(x_NChW)).flatten(2).transpose(1, 2)[:, :, None]
        q, k, v = qkv_NLHC.chunk(3, dim=-1)
        out_NLC = _attend(q, k, v, self.group).flatten(2)
        out_NChW = block.proj(out_NLC.transpose(1, 2).unflatten(2, (rows, -1)))
        return out_NChW.unflatten(0, (batch, -1)).transpose(1, 2) + x_BCFhW


def _attend(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, group: Group) -> Tensor:
    """Return the attention of this band's queries to all bands, (B, L, H, D)."""
    k_BSHD, v_BSHD = group.all_gather_uneven(torch.stack([k_BLHD, v_BLHD]), dim=2).unbind(0)
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
