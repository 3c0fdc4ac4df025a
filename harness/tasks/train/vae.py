"""The autoencoder: diffusers' ``AutoencoderKL``, trained on every emoji, with zero-mean unit-variance latents built in.

The loss on x in [-1, 1] is  |x - y| + a |grad x - grad y| + b (x - y)^2 + c KL.  At the share ``fold_at`` of the run,
the per-channel mean m and deviation s of the latents are folded into the weights: z' = (z - m) / s. A pipeline then
needs no latent statistics, and ``scaling_factor`` is 1. Folding is exact except at the decoder's zero-padded border;
the rest of the training corrects that.
"""

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from harness.config.train import VaeConfig
from harness.loggers.training import TrainingCallback
from harness.tasks.train.loop import PeriodicCallback, Trainer, batch_indices, load_ema, step_generator, total_steps


def build(config: VaeConfig, size: int) -> AutoencoderKL:
    """Build an untrained autoencoder for images of ``size`` x ``size`` pixels."""
    levels = len(config.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.channels),
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=size,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def to_float(pixels: Tensor) -> Tensor:
    """Convert uint8 (N, H, W, 3) to float (N, 3, H, W) in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def loss(vae: AutoencoderKL, x: Tensor, noise: Tensor, config: VaeConfig) -> Tensor:
    """Compute the training loss.

    Args:
        vae: The autoencoder.
        x: Images, (N, 3, H, W), in [-1, 1].
        noise: Unit noise of the posterior, (N, C, h, w).
        config: Weights of the loss terms.

    Returns:
        The loss, a scalar.
    """
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.mean + posterior.std * noise).sample
    error = y - x
    rows, columns = error.diff(dim=2), error.diff(dim=3)
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    edges = 0.5 * (rows.abs().mean() + columns.abs().mean())
    return error.abs().mean() + config.gradient_l1 * edges + config.mse * error.square().mean() + config.kl * kl


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor, batch: int = 64) -> Tensor:
    """Return the posterior means of uint8 images (N, H, W, 3), float (N, C, h, w)."""
    return torch.cat([vae.encode(to_float(part)).latent_dist.mean for part in pixels.split(batch)])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, batch: int = 64) -> Tensor:
    """Decode latents (N, C, h, w) to uint8 images (N, H, W, 3)."""
    parts = [vae.decode(part).sample for part in latents.split(batch)]
    return ((torch.cat(parts) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Return the peak signal-to-noise ratio of two uint8 tensors in decibels, over all their pixels."""
    return 20.0 * math.log10(255.0) - 10.0 * math.log10(float((a.float() - b.float()).square().mean()) + 1e-12)


@torch.no_grad()
def fold(weights: dict[str, Tensor], mean: Tensor, std: Tensor) -> None:
    """Rescale latents in place to z' = (z - mean) / std, per channel.

    The encoder's last convolution absorbs the map, and the decoder's first its inverse. Reconstructions do not change
    where the decoder's first convolution sees no padding.

    Args:
        weights: State dict of an AutoencoderKL, changed in place.
        mean: Mean of the latents, (C,).
        std: Deviation of the latents, (C,).
    """
    channels = len(mean)
    w, b = weights["encoder.conv_out.weight"], weights["encoder.conv_out.bias"]
    w[:channels] /= std.view(-1, 1, 1, 1)
    b[:channels] = (b[:channels] - mean) / std
    b[channels:] -= 2.0 * std.log()
    w, b = weights["decoder.conv_in.weight"], weights["decoder.conv_in.bias"]
    b += torch.einsum("oikl,i->o", w, mean)
    w *= std.view(1, -1, 1, 1)


def train(
    config: VaeConfig, pixels: Tensor, size: int, folder: Path, callback: TrainingCallback | None = None
) -> AutoencoderKL:
    """Train the autoencoder, or resume its training.

    Args:
        config: Configuration of the VAE.
        pixels: Training images, uint8 (N, size, size, 3).
        size: Width and height in pixels.
        folder: The run's folder.
        callback: Callback for the progress.

    Returns:
        The averaged model in evaluation mode.
    """
    torch.manual_seed(config.loop.seed)
    vae = build(config, size).to(memory_format=torch.channels_last)
    trainer = Trainer("vae", vae, config.loop, folder, callback)
    loop, side = config.loop, size // 2 ** (len(config.channels) - 1)

    def loss_of(step: int) -> Tensor:
        x = to_float(pixels[batch_indices(len(pixels), loop.batch, loop.seed, step)])
        generator = step_generator(loop.seed, step)
        flip = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(flip, x.flip(3), x).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(len(x), config.latent_channels, side, side, generator=generator)
        return loss(vae, x, noise, config)

    def fold_once(trainer: Trainer) -> None:
        if "fold" not in trainer.done and trainer.step >= config.fold_at * total_steps(loop):
            mean, std = statistics(vae, pixels)
            fold(vae.state_dict(), mean, std)
            fold(trainer.ema.shadow, mean, std)
            trainer.done.add("fold")

    trainer.run(loss_of, every=PeriodicCallback(1, fold_once))
    return load(config, size, trainer.checkpoint)


def statistics(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the per-channel mean and deviation (C,) of the latents of uint8 images."""
    latents = encode(vae, pixels)
    return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))


def load(config: VaeConfig, size: int, checkpoint: Path) -> AutoencoderKL:
    """Load the averaged autoencoder of a checkpoint, in evaluation mode."""
    vae = build(config, size)
    vae.load_state_dict(load_ema(checkpoint))
    return vae.eval().requires_grad_(False)
