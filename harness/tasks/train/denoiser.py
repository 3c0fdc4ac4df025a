"""The denoiser: the network, its inputs, and its training, the same for every family.

Latents and text states are computed once, before training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from harness.config.train import DenoiserConfig
from harness.loggers.training import TrainingCallback
from harness.tasks.train import text
from harness.tasks.train.captions import draw, variants
from harness.tasks.train.folder import Picture
from harness.tasks.train.loop import Every, Fit, batch_indices, step_generator
from harness.tasks.train.objective import Objective
from models.attention import math_attention
from models.pixart import PixArt, PixArtConfig


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
    latents: Tensor, rows: Sequence[Picture], encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerFast
) -> Examples:
    """Encode every caption that training can draw."""
    written = [variants(row.name, row.style, row.tags) for row in rows]
    index = {line: i for i, line in enumerate(dict.fromkeys(line for lines in written for line in lines))}
    states, mask = text.encode(encoder, tokenizer, [*index, ""])
    captions = [[index[line] for line in lines] for lines in written]
    return Examples(latents, states, mask.bool(), captions, [row.tags for row in rows])


def build(config: DenoiserConfig) -> PixArt:
    """An untrained network: Xavier linears, and an output of zero."""
    torch.manual_seed(config.loop.seed)
    heads = config.heads
    sizes = PixArtConfig(
        depth=config.depth,
        heads=heads,
        head_channels=config.width // heads,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        patch=config.patch,
        sample_size=config.latent_size,
        text_channels=config.text_channels,
    )
    model = PixArt(sizes, math_attention)
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.view(len(layer.weight), -1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for layer in (model.time_in, model.time_out, model.time_modulation):
        nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(model.project_out.weight)
    return model


def part(family: str) -> str:
    """Name of the family's checkpoint and curve."""
    return f"denoiser-{family}"


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
    config: DenoiserConfig,
    objective: Objective,
    examples: Examples,
    folder: Path,
    watcher: TrainingCallback | None = None,
    every: Every | None = None,
) -> Fit:
    """Train, or resume, the denoiser of one family to its end.

    Raises:
        ValueError: examples of other sizes than the network's, or a checkpoint of another objective.
    """
    _check_sizes(config, examples)
    fit = Fit(part(objective.family), build(config), config.loop, folder, watcher, str(objective))
    noise_scheduler = objective.noise_scheduler()

    def loss_of(step: int) -> Tensor:
        generator = step_generator(config.loop.seed, step)
        x0, states, mask = batch(examples, config, step, generator)
        return objective.loss(fit.model, noise_scheduler, x0, states, mask, generator)

    fit.run(loss_of, every=every)
    return fit


def _check_sizes(config: DenoiserConfig, examples: Examples) -> None:
    channels, height, width = examples.latents.shape[1:]
    keys = {
        "latent_channels": (config.latent_channels, channels),
        "latent_size": (config.latent_size, max(height, width)),
        "text_channels": (config.text_channels, examples.states.shape[-1]),
    }
    for key, (asked, found) in keys.items():
        if asked != found:
            raise ValueError(f"train.denoiser.{key}={asked}, but VAE and text encoder give {found}; set it to {found}")
