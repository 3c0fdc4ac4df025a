"""Run every test on one thread: ranks share the cores, and one thread gives the same numbers each time."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed PyTorch, so that random networks and tensors without their own generator are the same in every run."""
    torch.manual_seed(0)
