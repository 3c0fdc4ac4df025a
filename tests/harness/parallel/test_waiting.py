"""A rank that waits in vain for another one reports it instead of waiting for ever."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from harness.parallel.mesh import RankPosition
from harness.parallel.process_groups import make_process_groups
from harness.serving.faults import failure_line, is_peer_lost
from tests.fixtures.parallel.ranks import on_ranks


def wait_in_vain(rank: int, size: int) -> dict[str, Tensor]:
    """Rank 0 begins collectives that no other rank joins; each one breaks its group, so each has its own."""
    groups = make_process_groups(RankPosition(rank, (1, 1, 1, 1, size)), torch.device("cpu"), timedelta(seconds=2))
    if rank == 0:
        for group in (groups.ulysses, groups.tokens):
            with pytest.raises(RuntimeError) as caught:
                group.all_gather(torch.ones(4)) if group is groups.ulysses else group.shift(torch.ones(4))()
            assert "did not answer within 2 s" in failure_line(caught.value)
            assert not is_peer_lost(caught.value)
    dist.barrier()
    return {}


def test_a_collective_waits_no_longer_than_its_timeout() -> None:
    on_ranks(2, wait_in_vain)
