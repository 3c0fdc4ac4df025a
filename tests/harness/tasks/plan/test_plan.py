"""A plan is arithmetic that can be checked by hand, lists only what may run, and counts as records count."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec
import pytest
import torch
from rich.console import Console

from harness.config.plan import HardwareConfig
from harness.config.schema import LaunchConfig, ParallelConfig
from harness.costs.memory import WeightBytes
from harness.costs.plan_file import LayoutPrediction, Plan
from harness.costs.request_trace import RequestTrace, trace_request
from harness.costs.roofline import DeviceRates, predict, traffic, valid_layouts
from harness.costs.traffic import GatheredWeights, LinearCall, NetworkTrace, ShardedAttention, TokenStreams
from harness.device.flops import count_operations
from harness.records.record import Record, read_record, read_status
from harness.resolve.compose import ConfigError, compose_run
from harness.resolve.layout_rules import check_layout
from harness.tasks import bench as bench_task
from harness.tasks.common.under_torchrun import _compose
from harness.tasks.plan import entry
from harness.tasks.plan.check import check
from harness.tasks.plan.measure import with_measured_rates
from harness.tasks.plan.run import FILE, plan_layouts
from harness.tasks.plan.table import layout_label
from models.attention import sdpa_attention
from models.components import Conditioning
from models.dit import DiT, read_config
from models.plan import ParallelPlan, Stack
from models.registry import PUBLISHED

TOKENS = TokenStreams(2, (8,))
TRACE = NetworkTrace(
    batch=2,
    attention=(ShardedAttention(TOKENS, heads=4, channels=10, sharded_mask=False),),
    outputs=((TOKENS, 40),),
    row_linears=((TOKENS, 40),),
    sharded_norms=(),
    output_elements=100,
    linears=(LinearCall(TOKENS, 40, 120, "outputs"), LinearCall(TOKENS, 40, 40, "inputs")),
    local_attention=(),
    other_flops=1000,
    widest=0,
)
BRANCH = replace(TRACE, batch=1, output_elements=50)
GATHERED = GatheredWeights(parameters=((7, 100, 0), (8, 30, 1), (3, 2, None)), calls=5)
TRACED = RequestTrace(
    TRACE,
    BRANCH,
    WeightBytes(10_000, 8_000),
    500,
    itemsize=2,
    latent_bytes=400,
    decode_bytes=0,
    gathered=GATHERED,
    plan=ParallelPlan(stacks=(Stack("blocks", {"x_BLD": 1}),)),
)
MACHINE = DeviceRates(
    flops=1e6, memory=1e9, memory_bytes=1e6, link=(1e6, 1e-3), network=(1e5, 1e-2), devices_per_node=4
)


def predicted(on: DeviceRates = MACHINE, **layout: int) -> LayoutPrediction:
    return predict(TRACED, ParallelConfig(**layout), on, evaluations=3, micro_batches=4, notes=[])


def test_one_rank_by_hand() -> None:
    row = predicted()
    assert row.attention_flops == 4 * 16 * 8 * 40
    assert row.flops == 2 * 16 * 40 * (120 + 40) + row.attention_flops + 1000
    assert row.moved_bytes == 10_000 + 2 * (16 * (40 + 120 + 40 + 40) + 4 * 16 * 40)
    assert row.step_ms == pytest.approx(row.flops / 1e6 * 1e3)
    assert row.exchanges == []
    assert row.denoising_ms == pytest.approx(3 * 4 * row.step_ms)
    assert predicted(dp=3).denoising_ms == pytest.approx(3 * 2 * row.step_ms)


def test_a_slow_memory_is_the_roof() -> None:
    slow = replace(MACHINE, memory=1e4)
    row = predicted(slow)
    assert row.step_ms == pytest.approx(row.moved_bytes / 1e4 * 1e3)


def test_collectives_by_hand() -> None:
    half = 2 * (16 // 2) * 40  # bytes of a rank's queries
    to_heads, gathered = predicted(ulysses=2).exchanges
    assert (to_heads.axis, to_heads.bytes, to_heads.calls) == ("ulysses", 4 * half // 2, 4)
    assert to_heads.transfer_ms == to_heads.exposed_ms == pytest.approx(4 + 4 * half / 2 / 1e6 * 1e3)
    assert (gathered.axis, gathered.bytes, gathered.calls) == ("tokens", half, 1)
    (summed,) = predicted(tp=2).exchanges
    assert (summed.axis, summed.bytes, summed.calls) == ("tp", 2 * 16 * 40, 1)
    (branches,) = predicted(cfg=2).exchanges
    assert (branches.axis, branches.bytes, branches.calls) == ("cfg", 4 * 50, 1)


def test_gathered_weights_by_hand() -> None:
    *_, gathered = predicted(cfg=2, ulysses=2, shard_weights=True).exchanges
    assert (gathered.axis, gathered.kind, gathered.calls) == ("weights", "all_gather weights", 5)
    assert gathered.bytes == 3 * (2 * 100 + 2 * 30 + 1 * 2)
    assert gathered.exposed_ms == pytest.approx(5 + gathered.bytes / 1e6 * 1e3)
    *_, gathered = predicted(tp=2, ring=2, shard_weights=True).exchanges
    assert gathered.bytes == 1 * (2 * 100 + 4 * 15 + 2 * 2)


def test_bytes_of_approximate_layouts_by_hand() -> None:
    x = 2 * 16 * 40  # bytes of the tokens between two blocks
    assert traffic(TRACED, ParallelConfig(ring=2, displaced=True)) == {"all_gather displaced": x, "all_gather": x // 2}
    pipeline = ParallelConfig(cfg=2, pipe=2)
    assert traffic(TRACED, pipeline, index=2) == {"send": x, "all_gather": 4 * 50}
    assert traffic(TRACED, pipeline, index=3) == {"broadcast": 2 * 50, "all_gather": 4 * 50}


def test_a_ring_hides_what_attention_covers() -> None:
    shift = predicted(ring=2).exchanges[0]
    attention_ms = 4 * 8 * 8 * 40 / 1e6 * 1e3  # of a rank's queries to all keys
    assert shift.transfer_ms == pytest.approx(1 + 2 * 2 * 8 * 40 / 1e6 * 1e3)
    assert shift.exposed_ms == 0
    assert attention_ms / 2 > shift.transfer_ms
    slow = predicted(replace(MACHINE, link=(1e5, 1e-3)), ring=2).exchanges[0]
    assert slow.exposed_ms == pytest.approx(slow.transfer_ms - attention_ms / 2)


def test_an_axis_that_spans_nodes_takes_the_network() -> None:
    sent = {e.axis: e.between_nodes for e in predicted(cfg=2, tp=2, ulysses=4).exchanges}
    assert sent == {"ulysses": False, "tokens": False, "tp": True, "cfg": True}
    away = {e.axis: e.between_nodes for e in predicted(ulysses=3, ring=2).exchanges}
    assert away["ulysses"]  # ranks 3 to 5 are on two nodes of 4
    assert not any(
        e.between_nodes for e in predicted(replace(MACHINE, devices_per_node=None), ulysses=4, tp=2).exchanges
    )


def test_weights_are_sharded_by_tensor_parallelism_alone() -> None:
    assert predicted().weight_bytes == predicted(ulysses=2).weight_bytes == 10_000
    assert predicted(tp=4).weight_bytes == 2_000 + 8_000 // 4
    row = predicted()
    assert row.memory_bytes == 10_000 + 500 + row.activation_bytes + 400
    assert predicted(replace(MACHINE, memory_bytes=row.memory_bytes)).fits
    assert not predicted(replace(MACHINE, memory_bytes=row.memory_bytes - 1)).fits


def test_a_full_size_network_computes_what_a_counter_finds() -> None:
    row = predict(trace_request(compose_run(["task=plan", "model=dit_256"])), ParallelConfig(), MACHINE, 1, 1, [])
    with torch.device("meta"):
        network = DiT(read_config(PUBLISHED / "dit_256" / "transformer"), sdpa_attention)
        inputs = torch.empty(2, 4, 32, 32), torch.empty(2), Conditioning(labels=torch.empty(2, dtype=torch.long))
    flops: list[int] = []
    with torch.no_grad(), count_operations(flops.append):
        network(*inputs)
    assert [row.flops] == flops
    assert row.weight_bytes == 2 * sum(parameter.numel() for parameter in network.parameters())


@cache
def emoji(*overrides: str) -> Plan:
    return plan_layouts(compose_run(["task=plan", "request.prompt=rocket", *overrides]).config)


def test_every_legal_layout_is_listed_and_no_other() -> None:
    run = compose_run([])
    config, facts = run.config, run.shape
    found = [layout for layout, _ in valid_layouts(config, facts, 8, micro_batches=2)]
    for layout in found:
        check_layout(layout, facts)
    names = [layout_label(layout) for layout in found]
    assert len(names) == len(set(names))
    assert {"single", "dp2", "cfg2 tp2 ulysses2", "dp2 ring4", "ulysses8", "ring3 ulysses2"} <= set(names)
    assert not {"tp3", "dp4", "cfg2 tp3"} & set(names)  # 8 heads; two micro-batches
    assert {layout_label(row.layout) for row in emoji().layouts} == {n for n in names if not n.startswith("dp")}


def test_layouts_go_by_time_and_what_does_not_fit_goes_last() -> None:
    fits = [row.memory_bytes for row in emoji().layouts]
    assert all(row.fits for row in emoji().layouts)
    times = [row.denoising_ms for row in emoji().layouts]
    assert times == sorted(times)
    limit = (min(fits) + max(fits)) / 2 / 1e9
    tight = emoji(f"hardware.memory_gb={limit}").layouts
    assert [row.fits for row in tight] == sorted((row.fits for row in tight), reverse=True)
    assert {row.fits for row in tight} == {True, False}
    assert [row.fits for row in sorted(tight, key=lambda row: row.denoising_ms)] != [row.fits for row in tight]


def test_a_plan_is_a_run_folder_with_every_number(tmp_path: Path) -> None:
    composed = compose_run(["task=plan", "plan.ranks=2", "request.prompt=rocket", f"hydra.run.dir={tmp_path / 'run'}"])
    console = Console(record=True, width=160, quiet=False, file=(tmp_path / "out").open("w"))
    assert entry.execute(composed, console).state == "ok"
    plan = msgspec.json.decode((composed.folder / FILE).read_bytes(), type=Plan)
    assert {layout_label(row.layout) for row in plan.layouts} == {"single", "cfg2", "tp2", "ring2", "ulysses2"}
    assert plan.measured == []
    assert "prediction, nothing of this was run: emoji on h100_sxm" in console.export_text()
    assert read_status(composed.folder).state == "ok"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Run a bench of two steps in this process."""
    requested = ["task=bench", "task.fidelity=false", "task.repeats=1", "launch.mode=inprocess", "logger=json"]
    requested += ["engine.optimize=none"]
    folder = tmp_path_factory.mktemp("plan") / "run"
    requested += ["request.prompts=[rocket,red apple]", "request.steps=2", f"hydra.run.dir={folder}"]
    composed = compose_run([*requested, "scheduler/solver=heun", "launch.threads_per_rank=1"])
    bench_task.execute(composed, Console(quiet=True))
    record = read_record(composed.folder)
    assert record is not None
    return record


def h100(dtype: torch.dtype) -> HardwareConfig:
    return compose_run([]).config.hardware


def test_an_approximate_layout_is_not_predicted(bench: Record) -> None:
    layout = bench.config["parallel"] | {"pipe": 2}
    found = check(Path("run"), msgspec.structs.replace(bench, config=bench.config | {"parallel": layout}), h100)
    assert found.predicted_step_ms is None
    assert found.reason is not None
    assert "only exact layouts are predicted" in found.reason
    assert layout_label(found.layout) == "pipe2"


def test_operations_are_those_of_a_record(bench: Record) -> None:
    found = check(Path("run"), bench, h100)
    assert found.flops is not None
    assert found.predicted_flops == found.flops
    assert found.predicted_bytes == found.sent_bytes == {}
    assert found.error == pytest.approx(found.predicted_step_ms / found.step_ms - 1)  # type: ignore[operator]


def test_operations_that_are_spared_are_not_predicted(bench: Record) -> None:
    engine = bench.config["engine"] | {"optimize": "eager"}
    found = check(Path("run"), msgspec.structs.replace(bench, config=bench.config | {"engine": engine}), h100)
    assert found.predicted_flops is None
    assert found.predicted_step_ms is not None


def test_a_record_whose_model_is_gone_says_so(bench: Record) -> None:
    gone = msgspec.json.decode(msgspec.json.encode(bench), type=Record)
    gone.config["model"]["path"] = "/no/such/folder"
    found = check(Path("run"), gone, h100)
    assert found.predicted_step_ms is None
    assert "no such folder" in str(found.reason)


def test_ranks_that_were_started_for_a_plan_are_refused() -> None:
    with pytest.raises(ConfigError, match="start it with python -m harness, not torchrun"):
        _compose(["task=plan"], ranks=1)


def test_what_is_given_is_not_measured() -> None:
    hardware = h100(torch.bfloat16)
    assert with_measured_rates(hardware, torch.bfloat16, LaunchConfig()) == (hardware, [])


@pytest.mark.slow
def test_what_is_null_is_measured_here() -> None:
    hardware = compose_run(["task=plan", "hardware=measured", "hardware.memory_gb=4"]).config.hardware
    found, measured = with_measured_rates(hardware, torch.float32, LaunchConfig(threads_per_rank=1))
    assert measured == ["float32_tflops", "memory_gb_s", "link_gb_s", "link_latency_us"]
    assert found.memory_gb == 4
    assert found.bfloat16_tflops is None
    assert all(getattr(found, name) > 0 for name in measured)


def test_bytes_of_a_layout_are_those_of_its_exchanges() -> None:
    sharded = ParallelConfig(tp=2, ring=2, shard_weights=True)
    for layout in (ParallelConfig(cfg=2, tp=2, ring=2, ulysses=2), ParallelConfig(ulysses=4), sharded):
        row = predict(TRACED, layout, MACHINE, 1, 1, [])
        by_kind: dict[str, int] = {}
        for exchange in row.exchanges:
            by_kind[exchange.kind] = by_kind.get(exchange.kind, 0) + exchange.bytes
        assert by_kind == traffic(TRACED, layout)
