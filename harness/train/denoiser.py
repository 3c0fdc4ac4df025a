"""The denoiser: one loop for every family; the family's path and prediction say what is fed in and what is asked back.

With ratio r = sigma / alpha drawn log-normal, t = t_of(r), and unit noise eps:

    x = alpha x0 + sigma eps,    loss = |network(c_in x, tau, text) - target(x0, eps, alpha, sigma)|^2.

On the flow path log r is the logit of t, so mean 0 and deviation 1 are the logit-normal times of Esser et al. 2024
(arXiv:2403.03206, section 3.1). Latents and text states are computed once, before training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from harness.config.train import DenoiserConfig
from harness.train import text
from harness.train.captions import draw, variants
from harness.train.emoji import Emoji
from harness.train.loop import Every, Fit, Mirror, batch_indices, step_generator
from models.attention import math_attention
from models.dit import DiT, DiTConfig
from schedulers.build import build as build_noise_scheduler
from schedulers.families import Settings
from schedulers.noise_scheduler import NoiseScheduler


@dataclass(frozen=True)
class Examples:
    """What the denoiser sees, all of it in memory.

    latents: float (N, C, h, w). states, mask: the distinct captions, float (M, L, D) and bool (M, L); the last one is
    the empty caption. captions: for each picture the rows of its variants in ``states``. tags: for each picture its
    tags.
    """

    latents: Tensor
    states: Tensor
    mask: Tensor
    captions: list[list[int]]
    tags: list[tuple[str, ...]]


def prepare(
    latents: Tensor, rows: Sequence[Emoji], encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerFast
) -> Examples:
    """Encode every caption that training can draw."""
    written = [variants(row.name, row.style, row.tags) for row in rows]
    index = {line: i for i, line in enumerate(dict.fromkeys(line for lines in written for line in lines))}
    states, mask = text.encode(encoder, tokenizer, [*index, ""])
    captions = [[index[line] for line in lines] for lines in written]
    return Examples(latents, states, mask.bool(), captions, [row.tags for row in rows])


def build(config: DenoiserConfig) -> DiT:
    """An untrained network: Xavier linears, and an output of zero."""
    torch.manual_seed(config.loop.seed)
    heads = config.heads
    sizes = DiTConfig(
        depth=config.depth,
        heads=heads,
        head_channels=config.width // heads,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        patch=config.patch,
        sample_size=config.latent_size,
        text_channels=config.text_channels,
    )
    model = DiT(sizes, math_attention)
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.view(len(layer.weight), -1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for layer in (model.time_in, model.time_out, model.time_modulation):
        nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(model.project_out.weight)
    return model


def part(config: DenoiserConfig) -> str:
    """Name of the family's checkpoint and curve."""
    return f"denoiser-{config.family}"


def noise_scheduler(config: DenoiserConfig) -> NoiseScheduler:
    """Path, prediction, spacing and solver of the family that is trained."""
    return build_noise_scheduler(Settings(config.family, config.prediction))


def loss(
    model: nn.Module,
    family: NoiseScheduler,
    x0: Tensor,
    states: Tensor,
    mask: Tensor,
    config: DenoiserConfig,
    generator: torch.Generator,
) -> Tensor:
    """The module's objective on latents x0 (B, C, h, w), text states (B, L, D) and their mask (B, L)."""
    z = torch.randn(len(x0), generator=generator, dtype=torch.float64)
    eps = torch.randn(x0.shape, generator=generator)
    t = family.path.t_of((config.ratio_mean + config.ratio_std * z).exp())
    alpha, sigma, c_in = (
        f(t).float().view(-1, 1, 1, 1) for f in (family.path.alpha, family.path.sigma, family.path.c_in)
    )
    output = model(c_in * (alpha * x0 + sigma * eps), family.path.tau(t).float(), states, mask)
    return (output - family.prediction.target(x0, eps, alpha, sigma)).square().mean()


def batch(
    examples: Examples, config: DenoiserConfig, step: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, text states and mask of a step, text trimmed to the longest caption drawn."""
    loop = config.loop
    chosen = batch_indices(len(examples.latents), loop.batch, loop.seed, step)
    shares = (config.style_share, config.tag_share, config.empty_share)
    uniform = torch.rand(loop.batch, 4, generator=generator)
    lines = []
    for picture, u in zip(chosen.tolist(), uniform, strict=True):
        variant = draw(examples.tags[picture], *shares, u)
        lines.append(len(examples.states) - 1 if variant is None else examples.captions[picture][variant])
    mask = examples.mask[lines]
    longest = int(mask.sum(dim=1).max())
    return examples.latents[chosen], examples.states[lines, :longest], mask[:, :longest]


def train(
    config: DenoiserConfig, examples: Examples, folder: Path, mirror: Mirror | None = None, every: Every | None = None
) -> Fit:
    """Train, or resume, the denoiser of one family to its end."""
    model = build(config)
    fit = Fit(part(config), model, config.loop, folder, mirror)
    family = noise_scheduler(config)

    def loss_of(step: int) -> Tensor:
        generator = step_generator(config.loop.seed, step)
        x0, states, mask = batch(examples, config, step, generator)
        return loss(model, family, x0, states, mask, config, generator)

    fit.run(loss_of, every=every)
    return fit
