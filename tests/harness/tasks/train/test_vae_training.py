"""Training the autoencoder: folding the latent statistics changes the latents, and the image only near its border."""

import torch

from harness.config.train import VaeConfig
from harness.tasks.train import vae

CONFIG = VaeConfig(channels=[8, 8, 16])


def test_fold_standardises_latents_and_keeps_the_interior() -> None:
    torch.manual_seed(0)
    model = vae.build(CONFIG, 64).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape))
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, -1.0, 2.0, 0.1]), torch.tensor([2.0, 0.5, 1.5, 1.0])
    with torch.no_grad():
        before = model.encode(vae.to_float(pixels)).latent_dist
        hidden = model.decoder.conv_in(before.mean)
        vae.fold(model.state_dict(), mean, std)
        after = model.encode(vae.to_float(pixels)).latent_dist
        hidden_after = model.decoder.conv_in(after.mean)
    shape = (1, -1, 1, 1)
    torch.testing.assert_close(after.mean, (before.mean - mean.view(shape)) / std.view(shape), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.std, before.std / std.view(shape), rtol=1e-4, atol=1e-5)
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(hidden_after[inside], hidden[inside], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(hidden_after, hidden, atol=1e-3)


def test_loss_is_the_kl_alone_for_a_perfect_reconstruction() -> None:
    torch.manual_seed(0)
    model = vae.build(CONFIG, 64)
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    noise = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        posterior = model.encode(x).latent_dist
        y = model.decode(posterior.mean + posterior.std * noise).sample
        error = y - x
        edges = 0.5 * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())
        rest = error.abs().mean() + 0.5 * edges + 0.5 * error.square().mean()
        found = vae.loss(model, x, noise, CONFIG)
    torch.testing.assert_close(found - rest, CONFIG.kl * posterior.kl().mean() / noise[0].numel(), rtol=1e-2, atol=1e-6)


def test_pixels_survive_the_float_range() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(1, 16, 16, 3)
    x = vae.to_float(pixels)
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    back = ((x + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(back, pixels)
