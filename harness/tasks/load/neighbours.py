"""Busy processes beside the ranks, like somebody else's work on the same machine: how much slower do answers come?

With load.neighbours=[0,1,2], a load has task.repeats rounds, and each round loads the engine beside every number of
busy processes, in alternation: 0 1 2, 2 1 0, 0 1 2 ...
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import msgspec

from harness.config.schema import RunConfig
from harness.engines.environment import import_environment
from harness.tasks.load.measurement import LoadMeasurement

BUSY = """
import sys
from harness.engines.processes import end_with_parent
end_with_parent(int(sys.argv[1]))
while True:
    pass
"""


def neighbour_rounds(config: RunConfig) -> list[int]:
    """Return the number of busy processes during each load of a run, in order; one load without any by default."""
    load, rounds = config.load, config.task.repeats
    if not load.neighbours:
        return [0]
    return [count for number in range(rounds) for count in load.neighbours[:: 1 if number % 2 == 0 else -1]]


@contextmanager
def busy_processes(count: int) -> Iterator[list[int]]:
    """Keep processes busy inside a `with` block; they end with it, and with this process.

    Args:
        count: The number of processes; each keeps one core busy.

    Yields:
        Their ids.
    """
    command = [sys.executable, "-c", BUSY, str(os.getpid())]
    environment = os.environ | import_environment()
    processes = [subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL) for _ in range(count)]
    try:
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def beside(measurement: LoadMeasurement, count: int) -> LoadMeasurement:
    """Return a measurement whose requests say how many busy processes were beside the ranks."""
    return replace(measurement, rows=[msgspec.structs.replace(row, neighbours=count) for row in measurement.rows])
