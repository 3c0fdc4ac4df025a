"""Groups `plan` and `hardware`: what task=plan predicts, and for which machine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path


@dataclass
class PlanConfig:
    """`plan`: what task=plan lists."""

    ranks: int = 8  # largest number of ranks of a layout
    rows: int = 12  # rows of the printed table; plan.json has all layouts
    runs: str | None = None  # folder of records to compare predictions with, in place of listing layouts


@dataclass
class HardwareConfig:
    """Group `hardware`: one device and its links. GB are 1e9 bytes; a rate that is null is measured on this machine.

    The attainable shares are assumptions and not from a datasheet. They say how much of the peak the kernels of a good
    implementation reach on large tensors.
    """

    name: str = "h100_sxm"  # name of the device
    bfloat16_tflops: float | None = None  # dense bfloat16 peak of a matrix product, TFLOP/s
    float32_tflops: float | None = None  # dense float32 peak of a matrix product, TFLOP/s
    memory_gb_s: float | None = None  # bandwidth of the device's memory, GB/s
    memory_gb: float | None = None  # size of the device's memory, GB
    link_gb_s: float | None = None  # bandwidth from one device to others of its node, GB/s
    link_latency_us: float | None = None  # latency of one collective within a node, us
    network_gb_s: float | None = None  # bandwidth from one device to other nodes, GB/s; null = nodes are not linked
    network_latency_us: float | None = None  # latency of one collective between nodes, us
    devices_per_node: int | None = None  # devices in one node
    compute_share: float = 0.6  # attainable share of the compute peak, 0 to 1
    memory_share: float = 0.8  # attainable share of the memory bandwidth, 0 to 1
    link_share: float = 0.7  # attainable share of the link and network bandwidth, 0 to 1


MEASURED = ("bfloat16_tflops", "float32_tflops", "memory_gb_s", "memory_gb", "link_gb_s", "link_latency_us")


def check_plan(plan: PlanConfig, hardware: HardwareConfig) -> None:
    """Refuse what cannot be predicted.

    Args:
        plan: The `plan` group.
        hardware: The machine that is predicted for.

    Raises:
        ValueError: A key has a wrong value; the message says what to give.
    """
    for name in ("ranks", "rows"):
        if getattr(plan, name) < 1:
            raise ValueError(f"plan.{name}={getattr(plan, name)}; give at least 1")
    if plan.runs is not None and not Path(plan.runs).expanduser().is_dir():
        raise ValueError(f"plan.runs={plan.runs}: no such folder; give a run's folder, a sweep's, or one above them")
    for key in fields(HardwareConfig):
        value = getattr(hardware, key.name)
        if isinstance(value, int | float) and value <= 0:
            raise ValueError(f"hardware.{key.name}={value}; give more than 0")
        if key.name.endswith("_share") and value > 1:
            raise ValueError(f"hardware.{key.name}={value}; a share is at most 1")
    node = hardware.devices_per_node
    if plan.runs is None and node is not None and plan.ranks > node and hardware.network_gb_s is None:
        raise ValueError(
            f"plan.ranks={plan.ranks}, but hardware={hardware.name} has {node} devices and no network to others; use "
            f"plan.ranks={node} or fewer, or give hardware.network_gb_s and hardware.network_latency_us"
        )
