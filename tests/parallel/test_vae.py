"""A decoder dealt over ranks by rows is the decoder on one rank, for any division of the rows."""

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from torch import Tensor

from harness.parallel.group import Group, Traffic
from harness.parallel.vae import band, deal_rows
from tests.models.parity import randomize, rel_l2
from tests.parallel.ranks import on_ranks


def vae() -> AutoencoderKL:
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    randomize(model)
    return model.eval()


def latent() -> Tensor:
    return torch.randn(2, 4, 9, 11, generator=torch.Generator().manual_seed(0))


def decode(rank: int, size: int) -> dict[str, Tensor]:
    group = Group(range(size), rank, dist.new_group(list(range(size))), Traffic())
    model = vae()
    deal_rows(model.decoder, group)
    rows = model.decode(band(latent(), group), return_dict=False)[0]
    return {"pixels": group.all_gather_uneven(rows, dim=2)}


@pytest.mark.parametrize("ranks", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_decoding_by_rows_is_decoding_at_once(ranks: int) -> None:
    with torch.inference_mode():
        alone = vae().decode(latent(), return_dict=False)[0]
    assert alone.std() > 0.1
    for found in on_ranks(ranks, decode):
        assert rel_l2(found["pixels"], alone) < 1e-5


def test_fewer_rows_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="9 latent rows cannot be dealt over 10 ranks"):
        band(latent(), Group(range(10), 0, None, Traffic()))
