"""A loop over configurations in Python, whose generators share the ranks of a pool."""

import gc
import logging
from pathlib import Path

import numpy as np

from harness.client import DiffusionGenerator
from harness.engines.pool import EnginePool
from harness.messages import Array

SMALL = ("launch.mode=inprocess", "launch.threads_per_rank=1", "request.prompt=rocket", "request.height=32")
SOLVERS = ("euler", "heun", "euler")


def test_generators_of_a_pool_change_the_ranks_of_the_last_one() -> None:
    images: list[Array] = []
    started_by: list[str] = []
    level = logging.getLogger().level
    with EnginePool() as pool:
        for solver in SOLVERS:
            overrides = (*SMALL, "request.steps=2", f"scheduler/solver={solver}")
            with DiffusionGenerator.from_config(*overrides, engines=pool.engine) as generator:
                generation = generator.generate()
                record = generation.record
            images += generation.pixels
            assert record.config["scheduler"]["solver"]["name"] == solver
            if record.first_call.reused is not None:
                started_by.append(record.first_call.reused)
        assert (pool.starts, pool.reuses) == (1, 2)
        assert [Path(folder).is_dir() for folder in started_by] == [True, True]  # ranks that run write their logs there
    assert logging.getLogger().level == level  # the process is the user's own
    del generator, generation
    gc.collect()
    assert not Path(started_by[0]).exists()
    assert np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[1])
