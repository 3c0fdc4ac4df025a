"""Tiny decoders of every kind with latents of odd sizes, and what each rank of a group makes of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
from torch import Tensor

from harness.config.schema import Decode
from harness.parallel.group import Group, TrafficCounter
from harness.parallel.vae import local_rows, parallel_decoder, shard_rows
from models.components import Decoder
from models.decoders import KLDecoder
from models.qwen_image.decoder import QwenImageDecoder
from models.wan.decoder import WanDecoder
from tests.models.parity import randomize
from tests.parallel.ranks import on_ranks

DTYPES = (torch.float32, torch.bfloat16)
STATISTICS = {"latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [1.5, 0.7, 1.2, 0.9]}


def kl(**options: object) -> KLDecoder:
    """Three levels, attention of one head in the middle."""
    sizes = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
    }
    return KLDecoder(AutoencoderKL(**sizes | options))


def wan(**options: object) -> WanDecoder:
    """Three levels; time is doubled in both of the upper ones, so that its convolutions have caches of every length."""
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, True]}
    return WanDecoder(AutoencoderKLWan(**sizes | STATISTICS | {"scale_factor_spatial": 4} | options))


def qwen_image() -> QwenImageDecoder:
    """The same levels, time doubled in one of them."""
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1}
    return QwenImageDecoder(AutoencoderKLQwenImage(**sizes | STATISTICS, temperal_downsample=[False, True]))


class QwenVideo:
    """Qwen-Image's autoencoder over several frames, which its class can decode though pictures have one."""

    def __init__(self, ranks: Group | None = None) -> None:
        self.vae = qwen_image().vae
        self.ranks = ranks

    def __call__(self, latent_BCFHW: Tensor) -> Tensor:
        """Frames (B, frames, 3, height, width) in [0, 1]."""
        z = latent_BCFHW.to(self.vae.dtype)
        frames = self.vae.decode(z if self.ranks is None else local_rows(z, self.ranks), return_dict=False)[0]
        pixels = frames.transpose(1, 2).float() / 2 + 0.5
        return pixels if self.ranks is None else self.ranks.all_gather_uneven(pixels, dim=-2)


@dataclass(frozen=True)
class Case:
    """One decoder, the shape of one latent, and the dtypes that it is decoded in.

    The third frame is the first that a convolution over time is handed two frames for.
    """

    make: Callable[[], KLDecoder | WanDecoder | QwenImageDecoder | QwenVideo]
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)

    def build(self, dtype: torch.dtype = torch.float32) -> Decoder:
        """The same random weights on every rank, rounded to bfloat16, with pixels that are neither black nor white."""
        decoder = self.make()
        randomize(decoder.vae)
        decoder.vae.decoder.conv_out.weight.data.mul_(0.3)
        for parameter in decoder.vae.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).to(dtype)
        decoder.vae.requires_grad_(False).eval()
        return decoder

    def latent(self) -> Tensor:
        """Random numbers."""
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(0))

    def parallel(self, group: Group, dtype: torch.dtype, by: Decode = Decode.rows) -> Decoder:
        """The decoder over the ranks of a group."""
        decoder = self.build(dtype)
        if isinstance(decoder, QwenVideo):
            shard_rows(decoder.vae.decoder, group)
            decoder.ranks = group
            return decoder
        return parallel_decoder(decoder, group, by)


CASES: dict[str, Case] = {
    "kl": Case(kl, (2, 4, 9, 11), DTYPES),
    "kl of 16 channels": Case(lambda: kl(latent_channels=16, use_post_quant_conv=False), (1, 16, 4, 3)),
    "kl without attention": Case(lambda: kl(mid_block_add_attention=False, layers_per_block=2), (1, 4, 6, 5)),
    "wan": Case(wan, (2, 4, 3, 7, 5)),
    "wan of one frame": Case(wan, (1, 4, 1, 4, 6), DTYPES),
    "wan 2.2": Case(
        lambda: wan(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=8),
        (1, 4, 2, 6, 5),
    ),
    "qwen image": Case(qwen_image, (2, 4, 5, 5), DTYPES),
    "qwen video": Case(QwenVideo, (1, 4, 3, 7, 6)),
}


VIDEOS: dict[str, Case] = {
    "wan": Case(wan, (2, 4, 9, 3, 2)),
    "wan of the fewest frames": Case(wan, (1, 4, 8, 2, 3)),
    "wan doubled once": Case(lambda: wan(temperal_downsample=[True, False]), (1, 4, 11, 2, 2)),
    "wan 2.2": Case(CASES["wan 2.2"].make, (1, 4, 9, 2, 2)),
}
"""Those that are dealt by latent frames too: 4 ranks have 2 or 3 each, and a first rank of 2 doubles one."""


@cache
def ranks_found(size: int) -> list[dict[str, Tensor]]:
    """What every rank of a world made of every case; asked once."""
    return on_ranks(size, decode)


def decode(rank: int, size: int) -> dict[str, Tensor]:
    """The pixels of every case in each of its dtypes, and the bytes that this rank sent for them, by kind."""
    traffic, found = TrafficCounter(), {}
    group = Group(range(size), rank, dist.new_group(list(range(size))), traffic)
    dealt = [(name, case, dtype, Decode.rows) for name, case in CASES.items() for dtype in case.dtypes]
    dealt += [(f"{name} by frames", case, torch.float32, Decode.frames) for name, case in VIDEOS.items()]
    for name, case, dtype, by in dealt:
        decoder = case.parallel(group, dtype, by)
        traffic.reset()
        found[f"{name} {dtype}"] = decoder(case.latent())
        found |= {f"{name} {dtype} {kind}": torch.tensor(sent) for kind, sent in traffic.sent_bytes.items()}
    return found
