"""The time and memory of one layout from a traced request: a roofline, and communication by kind.

One evaluation on a device with F operations and W bytes per second (peak x attainable share) takes

    max(flops / F, moved / W) + exposed communication

`moved` is every weight once, every linear's input and output, and queries, keys, values and output of every attention.
Elementwise work is assumed to be fused into those, and kernel launches to be hidden, as with large tensors. A
collective of `bytes` (harness.costs.traffic) in `calls` takes

    calls x latency + bytes / bandwidth

of the links within a node, or of those between nodes if its ranks are on more than one. Exposed is

    ulysses all-to-all, tp all-reduce, gathering of outputs, masks and weights, exchange of branches      all of it
    the ring's shifts       what is longer than (ring - 1) / ring of the attention, computed meanwhile

Ranks are numbered as in harness.parallel.mesh, ulysses innermost, so an axis is within a node if its ranks and those of
the axes inside it are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from harness.config.plan import HardwareConfig
from harness.config.schema import ParallelConfig, RunConfig
from harness.costs.flops import attention_flops, rank_flops, sharded_attention_flops
from harness.costs.memory import activation_elements
from harness.costs.plan_file import AxisCollective, LayoutPrediction
from harness.costs.request_trace import RequestTrace
from harness.costs.traffic import FLOAT32, NetworkTrace, pipe_bytes, sent_bytes, weight_bytes
from harness.parallel.fsdp import TRAFFIC_KIND
from harness.parallel.mesh import degrees, world_size
from harness.resolve.conflicts import LAYOUT_CONFLICTS, check_conflicts
from harness.resolve.layout_rules import ModelShape, check_layout

AXIS_OF = {"all_to_all": "ulysses", "shift": "ring", "all_reduce": "tp", "all_gather": "tokens"}


@dataclass(frozen=True)
class DeviceRates:
    """A machine as the formulas read it: attainable rates, in units per second.

    Args:
        flops: the operations per second in the denoiser's dtype.
        memory: the bytes per second between the device and its memory.
        memory_bytes: the size of the device's memory.
        link: the bytes per second out of a device within a node, and a collective's latency in seconds.
        network: the same between nodes; None if nodes are not connected.
        devices_per_node: the number of devices in a node; None if all devices are in one.
    """

    flops: float
    memory: float
    memory_bytes: float
    link: tuple[float, float]
    network: tuple[float, float] | None
    devices_per_node: int | None


def device_rates(hardware: HardwareConfig, itemsize: int) -> DeviceRates:
    """Return the machine's rates for elements of `itemsize` bytes.

    Args:
        hardware: the hardware, configured or measured.
        itemsize: the bytes per element of the denoiser's dtype.

    Returns:
        The attainable rates.

    Raises:
        ValueError: a rate that is neither configured nor measured.
    """
    key = "bfloat16_tflops" if itemsize == 2 else "float32_tflops"

    def require(name: str) -> float:
        value: float | None = getattr(hardware, name)
        if value is None:
            raise ValueError(f"hardware.{name} is null; set it, or use hardware=measured")
        return value

    network = None
    if hardware.network_gb_s is not None:
        latency = (hardware.network_latency_us or 0.0) * 1e-6
        network = (hardware.network_gb_s * 1e9 * hardware.link_share, latency)
    return DeviceRates(
        flops=require(key) * 1e12 * hardware.compute_share,
        memory=require("memory_gb_s") * 1e9 * hardware.memory_share,
        memory_bytes=require("memory_gb") * 1e9,
        link=(require("link_gb_s") * 1e9 * hardware.link_share, require("link_latency_us") * 1e-6),
        network=network,
        devices_per_node=hardware.devices_per_node,
    )


def predict(
    traced: RequestTrace,
    layout: ParallelConfig,
    machine: DeviceRates,
    evaluations: int,
    micro_batches: int,
    notes: list[str],
) -> LayoutPrediction:
    """Return the costs of one layout.

    Args:
        traced: the traced request.
        layout: a valid layout.
        machine: the machine's rates.
        evaluations: the denoiser evaluations per image.
        micro_batches: the micro-batches of the request.
        notes: notes on the layout.
    """
    sizes = degrees(layout)
    trace = _evaluated(traced, layout)
    flops, moved = (
        rank_flops(trace, sizes),
        traced.weights.per_rank(layout.tp) + traced.itemsize * moved_elements(trace, sizes),
    )
    compute_s, memory_s = flops / machine.flops, moved / machine.memory
    exchanges = list(_exchanges(traced, layout, machine))
    exposed_ms = sum(exchange.exposed_ms for exchange in exchanges)
    replica_size = world_size(sizes[1:])
    activations = max(traced.itemsize * activation_elements(trace, sizes), traced.decode_bytes // replica_size)
    weights = traced.weights.per_rank(layout.tp)
    memory_bytes = weights + traced.other_weights + activations + traced.latent_bytes
    step_ms = 1e3 * max(compute_s, memory_s) + exposed_ms
    return LayoutPrediction(
        layout=layout,
        ranks=world_size(sizes),
        flops=flops,
        attention_flops=attention_flops(trace, sizes),
        moved_bytes=moved,
        weight_bytes=weights,
        other_weight_bytes=traced.other_weights,
        activation_bytes=activations,
        memory_bytes=memory_bytes,
        fits=memory_bytes <= machine.memory_bytes,
        compute_ms=1e3 * compute_s,
        memory_ms=1e3 * memory_s,
        exchanges=exchanges,
        exposed_ms=exposed_ms,
        step_ms=step_ms,
        denoising_ms=step_ms * evaluations * math.ceil(micro_batches / layout.dp),
        notes=notes,
    )


def traffic(traced: RequestTrace, layout: ParallelConfig, index: int = 0) -> dict[str, int]:
    """Return the bytes that a rank sends in one evaluation, by kind of collective.

    Args:
        traced: the traced request.
        layout: a valid layout, exact or approximate.
        index: the rank's index in its replica; only ranks of a pipeline differ.
    """
    trace, sizes, itemsize = _evaluated(traced, layout), degrees(layout), traced.itemsize
    if layout.pipe > 1:
        sent = pipe_bytes(trace, traced.plan, layout.pipe, index % layout.pipe, itemsize)
        return sent | sent_bytes(trace, (1, layout.cfg, 1, 1, 1), itemsize)
    sent = sent_bytes(trace, sizes, itemsize, displaced=layout.displaced)
    if layout.shard_weights:
        sent[TRAFFIC_KIND] = weight_bytes(traced.gathered, _weight_ranks(layout), layout.tp)
    return sent


def _weight_ranks(layout: ParallelConfig) -> int:
    """Return the number of ranks that share the weights."""
    return layout.cfg * layout.ring * layout.ulysses


def valid_layouts(
    config: RunConfig, facts: ModelShape, ranks: int, micro_batches: int
) -> Iterator[tuple[ParallelConfig, list[str]]]:
    """Yield every exact layout of up to `ranks` ranks that may run, with notes on its padding.

    Layouts whose replicas would be idle are left out, and so are layouts with stale keys and values.

    Args:
        config: the resolved configuration, whose own layout is left aside.
        facts: the shape of the model.
        ranks: the largest number of ranks.
        micro_batches: the micro-batches of the request.

    Yields:
        A layout and its notes.
    """
    for cfg in (1, 2):
        for tp in range(1, ranks // cfg + 1):
            for ring in range(1, ranks // (cfg * tp) + 1):
                for ulysses in range(1, ranks // (cfg * tp * ring) + 1):
                    layout = ParallelConfig(cfg=cfg, tp=tp, ring=ring, ulysses=ulysses)
                    try:
                        check_conflicts(replace(config, parallel=layout), LAYOUT_CONFLICTS)
                        notes = check_layout(layout, facts)
                    except ValueError:
                        continue
                    for dp in range(1, min(ranks // (cfg * tp * ring * ulysses), micro_batches) + 1):
                        yield replace(layout, dp=dp), notes


def moved_elements(trace: NetworkTrace, sizes: tuple[int, ...]) -> int:
    """Return the elements that linears and attention read and write, without weights."""
    _, _, tp, ring, ulysses = sizes
    sp = ring * ulysses
    linears = sum(
        call.tokens.per_rank(sp)
        * (
            call.inputs // (tp if call.sharded_dim == "inputs" else 1)
            + call.outputs // (tp if call.sharded_dim == "outputs" else 1)
        )
        for call in trace.linears
    )
    own = sum(4 * call.tokens.per_rank(sp) * (call.heads // tp) * call.channels for call in trace.attention)
    other = sum(
        2 * (call.queries.per_rank(sp) + call.queries.batch * call.keys) * (call.heads // tp) * call.channels
        for call in trace.local_attention
    )
    return linears + own + other


def _evaluated(traced: RequestTrace, layout: ParallelConfig) -> NetworkTrace:
    return traced.one_branch if layout.cfg == 2 and traced.one_branch is not None else traced.both_branches


def _exchanges(traced: RequestTrace, layout: ParallelConfig, machine: DeviceRates) -> Iterator[AxisCollective]:
    trace, itemsize = _evaluated(traced, layout), traced.itemsize
    sizes, calls = degrees(layout), _calls(traced, layout)
    ranks, extent = world_size(sizes), _extents(layout)
    sent = sent_bytes(trace, degrees(replace(layout, cfg=1)), itemsize)
    rows = [(AXIS_OF[kind], kind, count) for kind, count in sent.items()]
    if layout.cfg > 1:
        rows.append(("cfg", "all_gather", FLOAT32 * trace.output_elements * (layout.cfg - 1)))
    if layout.shard_weights:
        rows.append(("weights", TRAFFIC_KIND, weight_bytes(traced.gathered, _weight_ranks(layout), layout.tp)))
    for axis, kind, count in rows:
        between_nodes = _between_nodes(extent[axis], ranks, machine.devices_per_node)
        rate, latency = machine.network if between_nodes and machine.network is not None else machine.link
        transfer_s = calls[axis] * latency + count / rate
        hidden = 0.0
        if axis == "ring":
            hidden = sharded_attention_flops(trace, sizes) / machine.flops * (layout.ring - 1) / layout.ring
        yield AxisCollective(
            axis, kind, count, calls[axis], between_nodes, 1e3 * transfer_s, 1e3 * max(0.0, transfer_s - hidden)
        )


def _calls(traced: RequestTrace, layout: ParallelConfig) -> dict[str, int]:
    """Return the number of collectives in one evaluation by axis, as harness.parallel calls them."""
    trace = _evaluated(traced, layout)
    return {
        "ulysses": 4 * len(trace.attention),
        "ring": (layout.ring - 1) * len(trace.attention),
        "tp": len(trace.row_linears) + len(trace.sharded_norms),
        "tokens": len(trace.outputs) + sum(call.sharded_mask for call in trace.attention),
        "cfg": 1,
        "weights": traced.gathered.calls,
    }


def _extents(layout: ParallelConfig) -> dict[str, int]:
    """Return the number of consecutive ranks that each axis and those inside it span."""
    tokens = layout.ring * layout.ulysses
    tp = tokens * layout.tp
    weights = tp * layout.cfg if layout.cfg > 1 else tokens
    return {
        "ulysses": layout.ulysses,
        "ring": tokens,
        "tokens": tokens,
        "tp": tp,
        "cfg": tp * layout.cfg,
        "weights": weights,
    }


def _between_nodes(extent: int, ranks: int, devices_per_node: int | None) -> bool:
    return (
        devices_per_node is not None
        and ranks > devices_per_node
        and (extent > devices_per_node or devices_per_node % extent > 0)
    )
