"""A decoder sharded over ranks by rows equals the decoder on one rank, for any division of rows, images and videos.

The same holds for a decoder sharded by latent frames, for any division of frames.
"""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from harness.config.schema import Decode
from harness.parallel.group import Group, TrafficCounter, single_process_group
from harness.parallel.vae import local_rows, parallel_decoder, shard_rows
from models.unet.unconditional import PixelDecoder
from tests.fixtures.models.parity import rel_l2
from tests.fixtures.parallel.decoders import CASES, VIDEOS, ranks_found


@cache
def one_rank_of(name: str) -> Tensor:
    """Decode a video on one rank with diffusers' own loop over frames."""
    with torch.inference_mode():
        return VIDEOS[name].build()(VIDEOS[name].latent())


SIZES = [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4))]


@cache
def one_rank(name: str, dtype: torch.dtype) -> Tensor:
    """Decode a case on one rank."""
    with torch.inference_mode():
        return CASES[name].build(dtype)(CASES[name].latent())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_decoding_by_rows_is_decoding_at_once(size: int, name: str) -> None:
    whole = one_rank(name, torch.float32)
    assert whole.std() > 0.03
    assert ((whole > 0) & (whole < 1)).float().mean() > 0.9
    for found in ranks_found(size):
        assert rel_l2(found[f"{name} torch.float32"], whole) < 1e-5


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize("size", SIZES)
def test_decoding_by_frames_is_decoding_one_by_one(size: int, name: str) -> None:
    whole = one_rank_of(name)
    assert whole.std() > 0.03
    assert ((whole > 0) & (whole < 1)).float().mean() > 0.9
    for found in ranks_found(size):
        assert rel_l2(found[f"{name} by frames torch.float32"], whole) < 1e-5


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_without_those_before_are_another_video(name: str) -> None:
    decoder, latent, whole = VIDEOS[name].build(), VIDEOS[name].latent(), one_rank_of(name)
    with torch.inference_mode():
        later = decoder(latent[:, :, 3:])[:, 1:]
    assert rel_l2(later, whole[:, -later.shape[1] :]) > 1e-3


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if torch.bfloat16 in case.dtypes])
@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_is_as_near_to_float32_as_on_one_rank(size: int, name: str) -> None:
    exact = one_rank(name, torch.float32)
    error = rel_l2(one_rank(name, torch.bfloat16), exact)
    assert error > 1e-4
    for found in ranks_found(size):
        assert rel_l2(found[f"{name} torch.bfloat16"], exact) < 1.5 * error


@pytest.mark.parametrize("name", CASES)
def test_bands_without_their_neighbours_are_another_image(name: str) -> None:
    decoder, latent = CASES[name].build(), CASES[name].latent()
    with torch.inference_mode():
        apart = torch.cat([decoder(part) for part in latent.tensor_split(2, dim=-2)], dim=-2)
    assert rel_l2(apart, one_rank(name, torch.float32)) > 1e-3


def ranks_of(size: int) -> Group:
    """Return the first of a group's ranks, not connected to the others."""
    return Group(range(size), 0, None, TrafficCounter())


def test_one_rank_and_pixels_are_left_as_they_are() -> None:
    decoder = CASES["wan"].build()
    assert parallel_decoder(decoder, single_process_group()) is decoder
    pixels = PixelDecoder(centered=True)
    assert parallel_decoder(pixels, ranks_of(2)) is pixels


@pytest.mark.parametrize("name", ["kl", "wan", "qwen image"])
def test_fewer_rows_than_ranks_are_refused(name: str) -> None:
    rows = CASES[name].shape[-2]
    message = f"{rows} latent rows cannot be sharded over {rows + 1} ranks; request a taller image"
    with pytest.raises(ValueError, match=message):
        CASES[name].parallel(ranks_of(rows + 1), torch.float32)(CASES[name].latent())
    assert local_rows(CASES[name].latent(), ranks_of(rows)).shape[-2] == 1


def test_fewer_than_two_latent_frames_a_rank_are_refused() -> None:
    decoder = VIDEOS["wan"].parallel(ranks_of(5), torch.float32, Decode.frames)
    with pytest.raises(ValueError, match="9 latent frames cannot be sharded over 5 ranks, 2 or more each"):
        decoder(VIDEOS["wan"].latent())


@pytest.mark.parametrize("name", ["kl", "qwen image"])
def test_an_image_has_no_frames_to_shard(name: str) -> None:
    with pytest.raises(ValueError, match="shards a video, and this model generates images; use rows"):
        CASES[name].parallel(ranks_of(2), torch.float32, Decode.frames)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(4, 4, 5, padding=2), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3)], ids=str
)
def test_a_convolution_that_reaches_further_is_refused(conv: nn.Conv2d) -> None:
    with pytest.raises(ValueError, match="kernels of 1 or 3 rows and stride 1"):
        shard_rows(nn.Sequential(conv), ranks_of(2))
