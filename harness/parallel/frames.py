"""Decoding one video on several ranks by time: each decodes consecutive latent frames.

Only convolutions over time use other frames than the one at hand. They are causal and span 3 frames. So every such
layer sends the last two frames of its input to the next rank, and nothing comes back. Norms are over channels,
attention is among the pixels of a frame, and nothing is approximated. The decoder stays diffusers' own
(AutoencoderKLWan).

One device decodes latent frames one by one, and stores two frames of every layer's input for the next. Ranks that did
so would wait for one another. Here a layer processes all frames of its rank at once, which needs their memory. A
video's first latent frame is one frame of pixels, each later one several. The layers that double time skip the first
frame. Their convolution does not see it, so that the second frame has zeros before it.

Shapes: B batch, C channels, F frames of this rank, H rows, W columns.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, unpatchify
from torch import Tensor, nn
from torch.nn import functional as F

from harness.parallel.group import Group
from harness.parallel.mesh import TEMPORAL_HALO
from models.wan.decoder import WanDecoder


class FramesDecoder:
    """A video decoder sharded over ranks by latent frames; latents and pixels are whole on every rank.

    Args:
        decoder: the decoder, written for one device; its layers are replaced in place.
        group: the ranks, which all have the same latents.
    """

    def __init__(self, decoder: WanDecoder, group: Group) -> None:
        shard_frames(decoder.vae.decoder, group)
        self.decoder = decoder
        self.group = group

    def __call__(self, latent_BCFHW: Tensor) -> Tensor:
        """Decode latents, as models.components.Decoder does.

        Args:
            latent_BCFHW: the latents.

        Returns:
            The pixels of all frames, (B, frames, 3, height, width).

        Raises:
            ValueError: if a rank would get fewer than two latent frames; on every rank, before any of them sends.
        """
        vae = self.decoder.vae
        z_BCFHW = self.decoder.denormalize(local_frames(latent_BCFHW, self.group))
        video_BCFHW = vae.decoder(vae.post_quant_conv(z_BCFHW), first_chunk=self.group.index == 0)
        if vae.config.patch_size is not None:
            video_BCFHW = unpatchify(video_BCFHW, vae.config.patch_size)
        return self.group.all_gather_uneven(self.decoder.pixels(video_BCFHW), dim=1)


def local_frames(latent_BCFHW: Tensor, group: Group) -> Tensor:
    """Return the latent frames of this rank.

    Args:
        latent_BCFHW: the latents of the video.
        group: the ranks.

    Returns:
        Consecutive latent frames.

    Raises:
        ValueError: if a rank would get fewer than two.
    """
    frames = latent_BCFHW.shape[2]
    if frames < TEMPORAL_HALO * group.size:
        raise ValueError(
            f"{frames} latent frames cannot be sharded over {group.size} ranks, {TEMPORAL_HALO} or more each; request "
            "a longer video, or use parallel.decode=rows"
        )
    return latent_BCFHW.tensor_split(group.size, dim=2)[group.index]


def shard_frames(decoder: nn.Module, group: Group) -> None:
    """Replace the layers of a decoder by layers that process all frames of a rank at once, in place."""
    children = [(owner, name, child) for owner in decoder.modules() for name, child in owner.named_children()]
    for owner, name, child in children:
        if isinstance(child, WanCausalConv3d) and is_temporal(child):
            setattr(owner, name, FramesConv3d(child, group))
        elif isinstance(child, WanResample) and child.mode == "upsample3d":
            setattr(owner, name, FramesUpsample(child, group))


def is_temporal(conv: WanCausalConv3d) -> bool:
    """Return whether a convolution uses earlier frames."""
    return conv.kernel_size[0] > 1


class FramesConv3d(nn.Module):
    """A causal convolution over this rank's frames and the last ones of the rank before; zeros before the first."""

    def __init__(self, conv: WanCausalConv3d, group: Group) -> None:
        super().__init__()
        self.conv = conv
        self.group = group

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        """Convolve this rank's frames."""
        last_BCFHW = x_BCFHW[:, :, -TEMPORAL_HALO:]
        missing = TEMPORAL_HALO - last_BCFHW.shape[2]  # on the first rank, which doubles only one of two latent frames
        return self.conv(x_BCFHW, self.group.shift_last(F.pad(last_BCFHW, (0, 0, 0, 0, missing, 0))))


class FramesUpsample(nn.Module):
    """Doubles rows, columns and frames, except the first frame of the video, which stays one."""

    def __init__(self, block: WanResample, group: Group) -> None:
        super().__init__()
        self.block = block
        self.first_frames = 1 if group.index == 0 else 0

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        """Upsample this rank's frames."""
        first, rest = x_BCFHW[:, :, : self.first_frames], x_BCFHW[:, :, self.first_frames :]
        pairs = self.block.time_conv(rest).unflatten(1, (2, -1))
        doubled = pairs.movedim(1, 3).flatten(2, 3)
        x_NCHW = torch.cat([first, doubled], dim=2).transpose(1, 2).flatten(0, 1)  # N = B F
        return self.block.resample(x_NCHW).unflatten(0, (len(x_BCFHW), -1)).transpose(1, 2)
