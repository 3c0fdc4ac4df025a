"""Decoding one video on several ranks by time: each holds consecutive latent frames, and gets what it needs of the ones
before.

Only convolutions over time look beyond a frame: they are causal, of 3 frames, so that every layer of them sends the
last two frames of its input to the next rank, and nothing comes back. Norms are over channels, attention is among the
pixels of a frame, and nothing is approximated. The decoder stays diffusers' own (AutoencoderKLWan).

One device decodes latent frames one by one and keeps two frames of every layer's input for the next. Ranks that did so
would wait for one another, so here a layer has all frames of its rank at once, which takes their memory too. A video's
first latent frame is one frame of pixels and each later one several: where time is doubled the first frame is passed
by, and to the convolution there it is not, so that the second one has zeros before it.

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
    """A video decoder dealt over ranks by latent frames, between whole latents and whole pixels.

    Its layers are replaced in place.

    Args:
        decoder: written for one device.
        group: ranks that hold the same latents.
    """

    def __init__(self, decoder: WanDecoder, group: Group) -> None:
        shard_frames(decoder.vae.decoder, group)
        self.decoder = decoder
        self.group = group

    def __call__(self, latent_BCFHW: Tensor) -> Tensor:
        """As models.components.Decoder.

        Raises:
            ValueError: fewer than two latent frames a rank; on every rank alike, before any of them sends.
        """
        vae = self.decoder.vae
        z_BCFHW = self.decoder.unscaled(local_frames(latent_BCFHW, self.group))
        video_BCFHW = vae.decoder(vae.post_quant_conv(z_BCFHW), first_chunk=self.group.index == 0)
        if vae.config.patch_size is not None:
            video_BCFHW = unpatchify(video_BCFHW, vae.config.patch_size)
        return self.group.all_gather_uneven(self.decoder.pixels(video_BCFHW), dim=1)


def local_frames(latent_BCFHW: Tensor, group: Group) -> Tensor:
    """This rank's latent frames.

    Raises:
        ValueError: fewer than two a rank.
    """
    frames = latent_BCFHW.shape[2]
    if frames < TEMPORAL_HALO * group.size:
        raise ValueError(
            f"{frames} latent frames cannot be dealt over {group.size} ranks, {TEMPORAL_HALO} or more each; ask for a longer "
            "video, or use parallel.decode=rows"
        )
    return latent_BCFHW.tensor_split(group.size, dim=2)[group.index]


def shard_frames(decoder: nn.Module, group: Group) -> None:
    """Makes every layer of a decoder work on a rank's frames, all at once, in place."""
    children = [(owner, name, child) for owner in decoder.modules() for name, child in owner.named_children()]
    for owner, name, child in children:
        if isinstance(child, WanCausalConv3d) and is_temporal(child):
            setattr(owner, name, FramesConv3d(child, group))
        elif isinstance(child, WanResample) and child.mode == "upsample3d":
            setattr(owner, name, FramesUpsample(child, group))


def is_temporal(conv: WanCausalConv3d) -> bool:
    """Whether a convolution needs frames before its own."""
    return conv.kernel_size[0] > 1


class FramesConv3d(nn.Module):
    """A causal convolution over this rank's frames and the last ones of the rank before; zeros before the first."""

    def __init__(self, conv: WanCausalConv3d, group: Group) -> None:
        super().__init__()
        self.conv = conv
        self.group = group

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        last_BCFHW = x_BCFHW[:, :, -TEMPORAL_HALO:]
        missing = TEMPORAL_HALO - last_BCFHW.shape[2]  # on the first rank, where two latent frames are one to double
        return self.conv(x_BCFHW, self.group.shift_last(F.pad(last_BCFHW, (0, 0, 0, 0, missing, 0))))


class FramesUpsample(nn.Module):
    """Twice the rows, columns and frames, but for the video's first frame, which stays one."""

    def __init__(self, block: WanResample, group: Group) -> None:
        super().__init__()
        self.block = block
        self.first_frames = 1 if group.index == 0 else 0

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        first, rest = x_BCFHW[:, :, : self.first_frames], x_BCFHW[:, :, self.first_frames :]
        pairs = self.block.time_conv(rest).unflatten(1, (2, -1))
        doubled = pairs.movedim(1, 3).flatten(2, 3)
        x_NCHW = torch.cat([first, doubled], dim=2).transpose(1, 2).flatten(0, 1)  # N = B F
        return self.block.resample(x_NCHW).unflatten(0, (len(x_BCFHW), -1)).transpose(1, 2)
