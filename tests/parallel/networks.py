"""A tiny network of every family with inputs whose tokens, text and heads do not divide evenly over ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from models.attention import AttentionKernel, math_attention
from models.components import Conditioning
from models.dit import PLAN as DIT_PLAN
from models.dit import DiT, DiTConfig
from models.flux import PLAN as FLUX_PLAN
from models.flux import Flux, FluxConfig
from models.pixart import PLAN as PIXART_PLAN
from models.pixart import PixArt, PixArtConfig
from models.plan import ParallelPlan
from models.qwen_image import PLAN as QWEN_PLAN
from models.qwen_image import QwenImage, QwenImageConfig
from models.sd3 import PLAN as SD3_PLAN
from models.sd3 import SD3, SD3Config
from models.wan import PLAN as WAN_PLAN
from models.wan import Wan, WanConfig
from models.wan.weights import KEEP_FLOAT32 as WAN_KEEPS_FLOAT32
from models.z_image import PLAN as Z_PLAN
from models.z_image import ZImage, ZImageConfig
from tests.models.parity import randomize

Inputs = tuple[Tensor, Tensor, Conditioning]


@dataclass(frozen=True)
class Tiny:
    """One network, its plan, what it is asked, and the parameters (patterns) that it keeps in float32."""

    make: Callable[[AttentionKernel], nn.Module]
    plan: ParallelPlan
    inputs: Inputs
    keep_float32: tuple[str, ...] = ()

    def build(self, kernel: AttentionKernel, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same random weights on every rank."""
        network = self.make(kernel)
        randomize(network)
        for name, parameter in network.named_parameters():
            if not any(fnmatch(name, pattern) for pattern in self.keep_float32):
                parameter.data = parameter.data.to(dtype)
        return network.requires_grad_(False).eval()

    def heads(self) -> int:
        """Attention heads, by the plan."""
        assert self.plan.heads is not None
        heads: int = getattr(self.make(math_attention).config, self.plan.heads)
        return heads


def rows(inputs: Inputs, which: Sequence[int]) -> Inputs:
    """Some rows of a batch."""
    latent, tau_B, condition = inputs
    of = {name: None if x is None else x[list(which)] for name, x in vars(condition).items()}
    return latent[list(which)], tau_B[list(which)], Conditioning(**of)


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


TAU = torch.tensor([700.0, 20.0])
MASK = torch.arange(7)[None] < torch.tensor([3, 7])[:, None]
TINY: dict[str, Tiny] = {
    "pixart": Tiny(
        lambda kernel: PixArt(PixArtConfig(2, 6, 8, 4, 4, 2, 8, 24), kernel),
        PIXART_PLAN,
        (_drawn(2, 4, 10, 14), TAU, Conditioning(_drawn(2, 7, 24), MASK)),
    ),
    "dit": Tiny(
        lambda kernel: DiT(DiTConfig(2, 4, 12, 4, 8, 2, 8, 10), kernel),
        DIT_PLAN,
        (_drawn(2, 4, 10, 14), TAU, Conditioning(labels=torch.tensor([3, 10]))),
    ),
    "sd3": Tiny(
        lambda kernel: SD3(SD3Config(3, 4, 12, 4, 2, 16, 11, 24, 10, dual=(0,), qk_norm=True), kernel),
        SD3_PLAN,
        (_drawn(2, 4, 10, 14), TAU, Conditioning(_drawn(2, 7, 24), pooled=_drawn(2, 10))),
    ),
    "flux": Tiny(
        lambda kernel: Flux(FluxConfig(2, 2, 4, 12, 4, 24, 10, (4, 4, 4), guidance=True), kernel),
        FLUX_PLAN,
        (
            _drawn(2, 4, 10, 14),
            TAU,
            Conditioning(_drawn(2, 7, 24), pooled=_drawn(2, 10), scale=torch.tensor([3.5, 1.0])),
        ),
    ),
    "qwen_image": Tiny(
        lambda kernel: QwenImage(QwenImageConfig(2, 4, 12, 4, 24, (4, 4, 4)), kernel),
        QWEN_PLAN,
        (_drawn(2, 4, 10, 14), TAU, Conditioning(_drawn(2, 7, 24), MASK)),
    ),
    "z_image": Tiny(
        lambda kernel: ZImage(ZImageConfig(2, 1, 4, 12, 4, 24, (4, 4, 4)), kernel),
        Z_PLAN,
        (_drawn(2, 4, 10, 14), TAU, Conditioning(_drawn(2, 7, 24), MASK)),
    ),
    "wan": Tiny(
        lambda kernel: Wan(WanConfig(2, 4, 12, 40, 4, text_channels=24, time_channels=32), kernel),
        WAN_PLAN,
        (_drawn(2, 4, 3, 6, 10), TAU, Conditioning(_drawn(2, 7, 24))),
        WAN_KEEPS_FLOAT32,
    ),
}
