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
from harness.tasks.train.captions import sample_caption, variants
from harness.tasks.train.folder import CaptionedImage
from harness.tasks.train.loop import PeriodicCallback, Trainer, batch_indices, step_generator
from harness.tasks.train.objective import Objective
from models.attention import math_attention
from models.pixart import PixArt, PixArtConfig


@dataclass(frozen=True)
class Examples:
    """The training data of the denoiser, all of it in memory.

    Attributes:
        latents: Latents of the images, float (N, C, h, w).
        states: Text states of the distinct captions, float (M, L, D); the last one is the empty caption.
        mask: Mask of the text states, bool (M, L).
        captions: Rows of ``states`` for the caption variants of each image.
        tags: Tags of each image.
    """

    latents: Tensor
    states: Tensor
    mask: Tensor
    captions: list[list[int]]
    tags: list[tuple[str, ...]]


def prepare(
    latents: Tensor, rows: Sequence[CaptionedImage], encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerFast
) -> Examples:
    """Encode every caption that training can sample.

    Args:
        latents: Latents of the images, float (N, C, h, w).
        rows: The images, in the same order.
        encoder: Trained text encoder.
        tokenizer: The text encoder's tokenizer.

    Returns:
        The training data.
    """
    captions_of_row = [variants(row.name, row.style, row.tags) for row in rows]
    index = {line: i for i, line in enumerate(dict.fromkeys(line for lines in captions_of_row for line in lines))}
    states, mask = text.encode(encoder, tokenizer, [*index, ""])
    captions = [[index[line] for line in lines] for lines in captions_of_row]
    return Examples(latents, states, mask.bool(), captions, [row.tags for row in rows])


def build(config: DenoiserConfig) -> PixArt:
    """Build an untrained network, with Xavier weights in its linears and an output of zero."""
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


def part_name(family: str) -> str:
    """Return the name of the family's checkpoint and curve."""
    return f"denoiser-{family}"


def batch(
    examples: Examples, config: DenoiserConfig, step: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Assemble the batch of one step.

    Args:
        examples: The training data.
        config: Configuration of the denoiser.
        step: Number of the step, from 0.
        generator: Random stream of the step.

    Returns:
        Latents, text states and mask; the text is trimmed to the longest caption of the batch.
    """
    loop = config.loop
    chosen = batch_indices(len(examples.latents), loop.batch, loop.seed, step)
    shares = (config.style_share, config.tag_share, config.empty_share)
    uniform = torch.rand(loop.batch, 4, generator=generator)
    lines = []
    for index, u in zip(chosen.tolist(), uniform, strict=True):
        variant = sample_caption(examples.tags[index], *shares, u)
        lines.append(len(examples.states) - 1 if variant is None else examples.captions[index][variant])
    mask = examples.mask[lines]
    longest = int(mask.sum(dim=1).max())
    return examples.latents[chosen], examples.states[lines, :longest], mask[:, :longest]


def train(
    config: DenoiserConfig,
    objective: Objective,
    examples: Examples,
    folder: Path,
    callback: TrainingCallback | None = None,
    every: PeriodicCallback | None = None,
) -> Trainer:
    """Train the denoiser of one family to its end, or resume its training.

    Args:
        config: Configuration of the denoiser.
        objective: The loss.
        examples: The training data.
        folder: Folder of the checkpoint and the loss curve.
        callback: Callback for the progress.
        every: Callback to run at intervals.

    Returns:
        The trainer, with the trained network.

    Raises:
        ValueError: The examples do not have the network's sizes, or the checkpoint has another objective.
    """
    _check_sizes(config, examples)
    trainer = Trainer(part_name(objective.family), build(config), config.loop, folder, callback, str(objective))
    noise_scheduler = objective.noise_scheduler()

    def loss_of(step: int) -> Tensor:
        generator = step_generator(config.loop.seed, step)
        x0, states, mask = batch(examples, config, step, generator)
        return objective.loss(trainer.model, noise_scheduler, x0, states, mask, generator)

    trainer.run(loss_of, every=every)
    return trainer


def _check_sizes(config: DenoiserConfig, examples: Examples) -> None:
    channels, height, width = examples.latents.shape[1:]
    keys = {
        "latent_channels": (config.latent_channels, channels),
        "latent_size": (config.latent_size, max(height, width)),
        "text_channels": (config.text_channels, examples.states.shape[-1]),
    }
    for key, (configured, found) in keys.items():
        if configured != found:
            raise ValueError(
                f"train.denoiser.{key}={configured}, but VAE and text encoder give {found}; set it to {found}"
            )
