"""Winograd's convolutions against direct ones, alone and in a decoder."""

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from harness.optimize import winograd as module
from harness.optimize.decoder import apply_winograd
from harness.optimize.winograd import WinogradConv2d
from models.decoders import KLDecoder
from tests.fixtures.models.parity import rel_l2
from tests.fixtures.models.vae import wide

SIZES = [(8, 8), (7, 12), (16, 5), (1, 1), (33, 2)]


def direct(conv: nn.Conv2d, x_BCHW: Tensor, upsampled: bool) -> Tensor:
    if upsampled:
        x_BCHW = F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
    return F.conv2d(x_BCHW, conv.weight, conv.bias, padding=1)


@pytest.mark.parametrize("band_bytes", [1, 40_000, 8 << 20], ids=["a row", "some rows", "all rows"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_is_a_convolution(step: int, bias: bool, band_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is equal up to rounding in float64 and in float32, for an image alone and in a batch."""
    monkeypatch.setattr(module, "BAND_BYTES", band_bytes)
    for height, width in SIZES:
        conv = nn.Conv2d(24, 10, 3, padding=1, bias=bias).double()
        x_BCHW = torch.randn(2, 24, height, width, dtype=torch.float64)
        wanted = direct(conv, x_BCHW, step == 1)
        with torch.inference_mode():
            found = WinogradConv2d(conv, step)(x_BCHW)
            assert found.stride(1) == 1, "the channels are innermost"
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
            low, x_low = conv.float(), x_BCHW.float()
            mine = WinogradConv2d(low, step)(x_low)
            assert rel_l2(mine.double(), wanted) < 1e-6
            assert torch.equal(WinogradConv2d(low, step)(x_low[1:]), mine[1:])


@pytest.mark.parametrize("onednn", [True, False])
def test_a_decoder_decodes_the_same_with_fewer_products(onednn: bool) -> None:
    decoder, latent = wide(), torch.randn(2, 4, 5, 6)
    with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=onednn):
        plain = decoder(latent)
        assert plain.std() > 0.01
        assert apply_winograd(decoder)
        made = [child for child in decoder.vae.decoder.modules() if isinstance(child, WinogradConv2d)]
        assert sorted(conv.step for conv in made) == [1, 1, *[2] * 8, *[4] * 4]
        assert len(made) == 14  # 4 in the middle, 5 in each of the wide up blocks, none in the narrow one
        torch.testing.assert_close(decoder(latent), plain, rtol=0, atol=1e-5)
    assert not apply_winograd(decoder), "nothing is left to replace"


def test_a_decoder_outside_float32_keeps_its_convolutions() -> None:
    decoder = wide()
    decoder.vae.to(torch.bfloat16)
    assert not apply_winograd(decoder)


@pytest.mark.slow
def test_a_published_decoder_rounds_as_much_as_direct_convolutions_of_onednn() -> None:
    """Stable Diffusion's VAE with its random initial weights, 64 px."""
    sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    decoder, latent = KLDecoder(AutoencoderKL(**sizes, **blocks).eval()), torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        direct = decoder.vae.decode(latent)[0].double()
        exact = decoder.vae.double().decode(latent.double())[0]
        decoder.vae.float()
        assert apply_winograd(decoder)
        mine = decoder.vae.decode(latent)[0].double()
    print(f"relative L2: {rel_l2(mine, exact):.1e}, direct {rel_l2(direct, exact):.1e}")
    assert rel_l2(mine, exact) <= 3 * rel_l2(direct, exact)  # 2.1 with AVX-512
