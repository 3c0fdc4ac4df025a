"""hardware=measured: the rates of this machine, by ranks that measure at once as ranks compute at once.

    a square matrix product in the denoiser's dtype     TFLOP/s (harness.device.flops.ceiling_tflops)
    a copy of 256 MiB                                   GB/s, read and written
    an all-gather of 16 MiB and of 8 bytes              GB/s out of a rank, and the latency of one collective

Every number is the slower rank's. Two ranks of launch.threads_per_rank threads are started by torchrun, and end here.
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
from harness.engines.environment import arithmetic_environment, import_path
from harness.parallel.connect import connect
from harness.parallel.mesh import Place
from harness.records.provenance import usable_cores

RANKS = 2
COPIED = 2**28  # bytes
SENT = 2**24
REPEATS = 20
WAIT = timedelta(minutes=1)


class Rates(msgspec.Struct, frozen=True):
    """What one rank measured, in the units of HardwareConfig."""

    tflops: float
    memory_gb_s: float
    memory_gb: float
    link_gb_s: float
    link_latency_us: float


def missing(hardware: HardwareConfig, item: int) -> list[str]:
    """The keys that a prediction in numbers of so many bytes needs and that are to be measured."""
    other = "float32_tflops" if item == 2 else "bfloat16_tflops"
    return [name for name in MEASURED if name != other and getattr(hardware, name) is None]


def filled(hardware: HardwareConfig, dtype: torch.dtype, launch: LaunchConfig) -> tuple[HardwareConfig, list[str]]:
    """A machine with what was null of it measured here; and which keys those are.

    Raises:
        ValueError: the ranks could not measure, with their last line.
    """
    names = missing(hardware, dtype.itemsize)
    if not names:
        return hardware, []
    here = measure(dtype, launch)
    of_key = msgspec.structs.asdict(here)
    found = {name: here.tflops if name.endswith("tflops") else of_key[name] for name in names}
    return msgspec.convert(msgspec.to_builtins(hardware) | found, HardwareConfig), names


def measure(dtype: torch.dtype, launch: LaunchConfig) -> Rates:
    """Starts the ranks, and waits for them.

    Raises:
        ValueError: they failed, with their last line.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < RANKS:
        raise ValueError(f"hardware=measured needs {RANKS} devices for its collective; give hardware.* by hand")
    environment = (
        os.environ | arithmetic_environment(launch, RANKS) | {"PYTHONPATH": import_path(os.environ.get("PYTHONPATH"))}
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rates.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        command += ["-m", "harness.tasks.plan.measure", str(out), str(dtype).removeprefix("torch.")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=launch.start_timeout_s)
        if not out.exists():
            lines = done.stderr.strip().splitlines() or ["without a word"]
            raise ValueError(f"hardware=measured: the ranks failed ({lines[-1].strip()}); give hardware.* by hand")
        return msgspec.json.decode(out.read_bytes(), type=Rates)


def rates(rank: int, dtype: torch.dtype, device: torch.device) -> Rates:
    """What this rank measures; every rank of the world calls it at once."""
    synchronize = synchronizer(device)
    axes = connect(Place(rank, (1, 1, 1, 1, RANKS)), device, WAIT)
    small, large = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (8, SENT))
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    dist.barrier()
    tflops = ceiling_tflops(device, dtype, synchronize)
    dist.barrier()
    copy_s = best_s(lambda: target.copy_(source), synchronize)
    dist.barrier()
    latency_s = best_s(lambda: axes.ulysses.all_gather(small), synchronize)
    sent_s = best_s(lambda: axes.ulysses.all_gather(large), synchronize)
    return Rates(
        tflops,
        2 * COPIED / copy_s / 1e9,
        memory_gb(device),
        SENT / max(sent_s - latency_s, 1e-9) / 1e9,
        latency_s * 1e6,
    )


def best_s(call: Callable[[], object], synchronize: Callable[[], None]) -> float:
    """The shortest of some repeats, after one that is not timed, s."""
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
    """A device's memory; on the CPU, this machine's over the ranks that have cores of their own."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return pages / 1e9 / max(1, usable_cores() // torch.get_num_threads())


def slowest(found: list[Rates]) -> Rates:
    """The lowest rates of any rank, and the longest latency."""
    least = Rates(*(min(values) for values in zip(*map(msgspec.structs.astuple, found), strict=True)))
    return msgspec.structs.replace(least, link_latency_us=max(one.link_latency_us for one in found))


def main() -> None:
    """One rank, under torchrun: writes what all measured where rank 0 was told to."""
    out, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo" if not torch.cuda.is_available() else "cpu:gloo,cuda:nccl")
    try:
        rank = dist.get_rank()
        mine = torch.tensor(
            msgspec.structs.astuple(rates(rank, dtype, pick_device(int(os.environ["LOCAL_RANK"])))), dtype=torch.float64
        )
        gathered = [torch.empty_like(mine) for _ in range(RANKS)]
        dist.all_gather(gathered, mine)
        if rank == 0:
            out.write_bytes(msgspec.json.encode(slowest([Rates(*row.tolist()) for row in gathered])))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
