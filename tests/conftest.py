"""One thread for every test, as other tests have ranks on the same cores, and the same numbers in every run."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Networks and tensors that a test draws without a generator of its own are the same in every run."""
    torch.manual_seed(0)
