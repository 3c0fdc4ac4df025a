"""Drawing from a denoiser in training: guided, with the family's own path, for a look and for the score."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from harness.train import text, vae
from harness.train.loop import step_generator
from models.dit import DiT
from schedulers.grid import Point
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.prediction import Estimate


@torch.no_grad()
def latents(
    model: DiT, family: NoiseScheduler, states: Tensor, mask: Tensor, guidance: float, steps: int, seed: int
) -> Tensor:
    """Guided samples (N, C, h, w) for text states (N + 1, L, D) and mask (N + 1, L); the last row is the empty caption.

    The guided output is  empty + guidance (text - empty)  (Ho and Salimans 2022, arXiv:2207.12598).
    """
    count, config = len(states) - 1, model.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)])
    both = torch.cat([states[:-1], states[-1:].expand(count, -1, -1)])
    both_mask = torch.cat([mask[:-1], mask[-1:].expand(count, -1)])

    def denoise(x: Tensor, point: Point) -> Estimate:
        tau = torch.full((2 * count,), point.tau)
        with_text, empty = model(point.c_in * torch.cat([x, x]), tau, both, both_mask).chunk(2)
        return family.prediction.estimate(empty + guidance * (with_text - empty), x, point)

    def fresh(i: int) -> Tensor:
        return torch.randn(noise.shape, generator=step_generator(seed, i))

    table = family.grid(steps)
    return family.sample(family.init_noise(noise, table), table, denoise, fresh)


def pictures(
    model: DiT,
    family: NoiseScheduler,
    autoencoder: AutoencoderKL,
    encoder: T5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    guidance: float = 3.0,
    steps: int = 24,
    seed: int = 0,
) -> Tensor:
    """uint8 pictures (N, H, W, 3) for ``prompts``, picture i from the noise of seed + i."""
    states, mask = text.encode(encoder, tokenizer, [*prompts, ""])
    return vae.decode(autoencoder, latents(model, family, states, mask.bool(), guidance, steps, seed))
