"""Groups `plan` and `hardware`: what task=plan predicts, and for which machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.config.bounds import MAX_DEGREE
from schedulers.options import option


@dataclass
class PlanConfig:
    """`plan`: what task=plan lists."""

    ranks: int = option(8, "Largest number of ranks of a layout.", low=1, high=MAX_DEGREE)
    rows: int = option(12, "Rows of the printed table; plan.json has all layouts.", low=1, high=10_000)
    runs: str | None = option(None, "Folder of records to compare predictions with, in place of listing layouts.")


@dataclass
class HardwareConfig:
    """Group `hardware`: one device and its links. GB are 1e9 bytes; a rate that is null is measured on this machine.

    The attainable shares are assumptions and not from a datasheet. They say how much of the peak the kernels of a good
    implementation reach on large tensors.
    """

    name: str = option("h100_sxm", "Name of the device.")
    bfloat16_tflops: float | None = option(
        None, "Dense bfloat16 peak of a matrix product. null = measured on this machine.", unit="TFLOP/s", above=0
    )
    float32_tflops: float | None = option(
        None, "Dense float32 peak of a matrix product. null = measured on this machine.", unit="TFLOP/s", above=0
    )
    memory_gb_s: float | None = option(
        None, "Bandwidth of the device's memory. null = measured on this machine.", unit="GB/s", above=0
    )
    memory_gb: float | None = option(
        None, "Size of the device's memory. null = measured on this machine.", unit="GB", above=0
    )
    link_gb_s: float | None = option(
        None, "Bandwidth from one device to others of its node. null = measured on this machine.", unit="GB/s", above=0
    )
    link_latency_us: float | None = option(
        None, "Latency of one collective within a node. null = measured on this machine.", unit="us", above=0
    )
    network_gb_s: float | None = option(
        None, "Bandwidth from one device to other nodes. null = nodes are not linked.", unit="GB/s", above=0
    )
    network_latency_us: float | None = option(None, "Latency of one collective between nodes.", unit="us", above=0)
    devices_per_node: int | None = option(None, "Devices in one node.", low=1, high=MAX_DEGREE)
    compute_share: float = option(0.6, "Attainable share of the compute peak.", above=0, high=1)
    memory_share: float = option(0.8, "Attainable share of the memory bandwidth.", above=0, high=1)
    link_share: float = option(0.7, "Attainable share of the link and network bandwidth.", above=0, high=1)


MEASURED = ("bfloat16_tflops", "float32_tflops", "memory_gb_s", "memory_gb", "link_gb_s", "link_latency_us")


def check_plan(plan: PlanConfig, hardware: HardwareConfig) -> None:
    """Refuse what cannot be predicted.

    Args:
        plan: The `plan` group.
        hardware: The machine that is predicted for.

    Raises:
        ValueError: A key has a wrong value; the message says what to give.
    """
    if plan.runs is not None and not Path(plan.runs).expanduser().is_dir():
        raise ValueError(f"plan.runs={plan.runs}: no such folder; give a run's folder, a sweep's, or one above them")
    node = hardware.devices_per_node
    if plan.runs is None and node is not None and plan.ranks > node and hardware.network_gb_s is None:
        raise ValueError(
            f"plan.ranks={plan.ranks}, but hardware={hardware.name} has {node} devices and no network to others; use "
            f"plan.ranks={node} or fewer, or give hardware.network_gb_s and hardware.network_latency_us"
        )
