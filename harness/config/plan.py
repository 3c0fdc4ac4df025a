"""Groups `plan` and `hardware`: what task=plan predicts, and for which machine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path


@dataclass
class PlanConfig:
    """What task=plan lists."""

    ranks: int = 8  # layouts of up to so many ranks
    rows: int = 12  # of the table; plan.json has all


@dataclass
class HardwareConfig:
    """Group `hardware`: one device and its links. GB are 1e9 bytes; a rate that is null is measured on this machine.

    The attainable shares are assumptions, not of any datasheet: of the peak, what kernels of a good implementation
    reach on large tensors.
    """

    name: str = "h100_sxm"
    bfloat16_tflops: float | None = None  # dense peak of a matrix product
    float32_tflops: float | None = None
    memory_gb_s: float | None = None  # bandwidth of the device's memory
    memory_gb: float | None = None  # its size
    link_gb_s: float | None = None  # out of one device, to others of its node
    link_latency_us: float | None = None  # of one collective within a node
    network_gb_s: float | None = None  # out of one device, to other nodes; null = nodes are not linked
    network_latency_us: float | None = None
    devices_per_node: int | None = None
    compute_share: float = 0.6  # attainable, of the peak
    memory_share: float = 0.8
    link_share: float = 0.7


MEASURED = ("bfloat16_tflops", "float32_tflops", "memory_gb_s", "memory_gb", "link_gb_s", "link_latency_us")


def check_plan(plan: PlanConfig, hardware: HardwareConfig, runs: str | None) -> None:
    """Refuses what cannot be predicted.

    Args:
        plan: what is listed.
        hardware: that it is listed for.
        runs: a tree of records to hold predictions against, in place of the layouts.

    Raises:
        ValueError: the key, and what to give.
    """
    for name in ("ranks", "rows"):
        if getattr(plan, name) < 1:
            raise ValueError(f"plan.{name}={getattr(plan, name)}; give at least 1")
    if runs is not None and not Path(runs).expanduser().is_dir():
        raise ValueError(f"runs={runs}: no such folder; give a run's folder, a sweep's, or one above them")
    for key in fields(HardwareConfig):
        value = getattr(hardware, key.name)
        if isinstance(value, int | float) and value <= 0:
            raise ValueError(f"hardware.{key.name}={value}; give more than 0")
        if key.name.endswith("_share") and value > 1:
            raise ValueError(f"hardware.{key.name}={value}; a share is at most 1")
    node = hardware.devices_per_node
    if runs is None and node is not None and plan.ranks > node and hardware.network_gb_s is None:
        raise ValueError(
            f"plan.ranks={plan.ranks}, but hardware={hardware.name} has {node} devices and no network to others; use "
            f"plan.ranks={node} or fewer, or give hardware.network_gb_s and hardware.network_latency_us"
        )
