"""hardware=measured: the rates of this machine, measured by ranks that run at the same time, as in a real run.

    a square matrix product in the denoiser's dtype     TFLOP/s (harness.device.flops.ceiling_tflops)
    a copy of 256 MiB                                   GB/s, read and written
    an all-gather of 16 MiB and of 8 bytes              GB/s out of a rank, and the latency of one collective

Every number is the slower rank's. torchrun starts two ranks of launch.threads_per_rank threads; they end here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from harness.config.plan import MEASURED, HardwareConfig
from harness.config.schema import LaunchConfig
from harness.device.cuda import synchronizer
from harness.device.device import pick_device
from harness.device.flops import ceiling_tflops
from harness.engines.environment import OWNER, arithmetic_environment, import_environment, loopback_environment
from harness.engines.processes import end_with_parent
from harness.engines.rendezvous import join_ranks
from harness.parallel.mesh import RankPosition
from harness.parallel.process_groups import make_process_groups
from harness.records.provenance import usable_cores

RANKS = 2
COPY_BYTES = 2**28
GATHER_BYTES = 2**24
REPEATS = 20
TIMEOUT = timedelta(minutes=1)


class Rates(msgspec.Struct, frozen=True):
    """The rates that one rank measured, in the units of HardwareConfig.

    Attributes:
        tflops: Rate of a matrix product, TFLOP/s.
        memory_gb_s: Memory bandwidth, GB/s.
        memory_gb: Memory per rank, GB.
        link_gb_s: Rate of an all-gather out of one rank, GB/s.
        link_latency_us: Latency of one collective, microseconds.
    """

    tflops: float
    memory_gb_s: float
    memory_gb: float
    link_gb_s: float
    link_latency_us: float


def missing_rates(hardware: HardwareConfig, item: int) -> list[str]:
    """Return the unset keys that a prediction needs.

    Args:
        hardware: The machine, with some rates unset.
        item: Bytes per number of the denoiser's dtype.

    Returns:
        The keys that have to be measured.
    """
    other = "float32_tflops" if item == 2 else "bfloat16_tflops"
    return [name for name in MEASURED if name != other and getattr(hardware, name) is None]


def with_measured_rates(
    hardware: HardwareConfig, dtype: torch.dtype, launch: LaunchConfig
) -> tuple[HardwareConfig, list[str]]:
    """Fill in the unset rates of a machine with rates measured here.

    Args:
        hardware: The machine, with some rates unset.
        dtype: The denoiser's dtype.
        launch: Threads per rank and time limit of the measurement.

    Returns:
        The machine with all rates, and the keys that were measured.

    Raises:
        ValueError: The ranks could not measure; the error has their last line.
    """
    names = missing_rates(hardware, dtype.itemsize)
    if not names:
        return hardware, []
    rates = measure_rates(dtype, launch)
    by_key = msgspec.structs.asdict(rates)
    found = {name: rates.tflops if name.endswith("tflops") else by_key[name] for name in names}
    return msgspec.convert(msgspec.to_builtins(hardware) | found, HardwareConfig), names


def measure_rates(dtype: torch.dtype, launch: LaunchConfig) -> Rates:
    """Start the ranks, and wait for their rates.

    Args:
        dtype: The denoiser's dtype.
        launch: Threads per rank and time limit.

    Returns:
        The rates of the slower rank.

    Raises:
        ValueError: There are too few devices, or the ranks failed; the error has their last line.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < RANKS:
        raise ValueError(f"hardware=measured needs {RANKS} devices for its collective; give hardware.* by hand")
    environment = os.environ | arithmetic_environment(launch, RANKS) | import_environment() | loopback_environment()
    environment |= {OWNER: str(os.getpid())}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rates.json"
        command = [sys.executable, "-m", "harness.engines.rendezvous", "--nproc-per-node", str(RANKS)]
        command += ["-m", "harness.tasks.plan.measure", str(out), str(dtype).removeprefix("torch.")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=launch.start_timeout_s)
        if not out.exists():
            lines = done.stderr.strip().splitlines() or ["no output"]
            raise ValueError(f"hardware=measured: the ranks failed ({lines[-1].strip()}); give hardware.* by hand")
        return msgspec.json.decode(out.read_bytes(), type=Rates)


def measure_on_rank(rank: int, dtype: torch.dtype, device: torch.device) -> Rates:
    """Measure the rates of this rank; every rank calls it at the same time.

    Args:
        rank: Global rank.
        dtype: The denoiser's dtype.
        device: Device of the rank.

    Returns:
        The rates of this rank.
    """
    synchronize = synchronizer(device)
    groups = make_process_groups(RankPosition(rank, (1, 1, 1, 1, RANKS)), device, TIMEOUT)
    small, large = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (8, GATHER_BYTES))
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    dist.barrier()
    tflops = ceiling_tflops(device, dtype, synchronize)
    dist.barrier()
    copy_s = best_s(lambda: target.copy_(source), synchronize)
    dist.barrier()
    latency_s = best_s(lambda: groups.ulysses.all_gather(small), synchronize)
    sent_s = best_s(lambda: groups.ulysses.all_gather(large), synchronize)
    return Rates(
        tflops,
        2 * COPY_BYTES / copy_s / 1e9,
        memory_gb(device),
        GATHER_BYTES / max(sent_s - latency_s, 1e-9) / 1e9,
        latency_s * 1e6,
    )


def best_s(call: Callable[[], object], synchronize: Callable[[], None]) -> float:
    """Return the shortest time of some repeats in seconds, after one call that is not timed."""
    call()
    best = float("inf")
    for _ in range(REPEATS):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def memory_gb(device: torch.device) -> float:
    """Return a device's memory in GB; on the CPU, the machine's memory over the ranks that have their own cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return pages / 1e9 / max(1, usable_cores() // torch.get_num_threads())


def slowest(rates: list[Rates]) -> Rates:
    """Return the lowest rates of any rank, and the longest latency."""
    least = Rates(*(min(values) for values in zip(*map(msgspec.structs.astuple, rates), strict=True)))
    return msgspec.structs.replace(least, link_latency_us=max(one.link_latency_us for one in rates))


def main() -> None:
    """Measure as one rank under torchrun; rank 0 writes the slowest rates to the file named on its command line."""
    end_with_parent(int(os.environ[OWNER]))
    out, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    join_ranks(out.parent, "gloo" if not torch.cuda.is_available() else "cpu:gloo,cuda:nccl")
    try:
        rank = dist.get_rank()
        own = torch.tensor(
            msgspec.structs.astuple(measure_on_rank(rank, dtype, pick_device(int(os.environ["LOCAL_RANK"])))),
            dtype=torch.float64,
        )
        gathered = [torch.empty_like(own) for _ in range(RANKS)]
        dist.all_gather(gathered, own)
        if rank == 0:
            out.write_bytes(msgspec.json.encode(slowest([Rates(*row.tolist()) for row in gathered])))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
