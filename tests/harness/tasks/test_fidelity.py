"""A method with less fidelity than it claims is called broken; the reference is generated once."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from harness.client.generator import DiffusionGenerator
from harness.config.schema import DType, ParallelConfig
from harness.metrics.difference import Difference
from harness.metrics.fidelity import APPROXIMATE, EQUIVALENT, EXACT, Fidelity, rounding_bound, verdict
from harness.records.record import read_record, read_status
from harness.resolve.compose import ResolvedRun, compose_run
from harness.tasks.common import references as kept_references
from harness.tasks.common.fidelity import MeasuredOutputs, measure_fidelity
from harness.tasks.common.measure import execute, status_from_fidelity
from harness.tasks.common.methods import METHODS, Method, method_class
from harness.tasks.common.progress import progress_bars
from harness.tasks.common.references import GeneratedOutput, ReferenceRenderer, floor_config, reference_config
from models.attention.backend import Backend
from models.attention.sdpa import sdpa_attention

BENCH = ["task=bench", "task.repeats=1", "task.warmup=1", "launch.mode=inprocess", "launch.threads_per_rank=1"]
REQUESTED = ["request.prompt=rocket", "request.steps=3", "logger=json"]
PLAIN = ["attention=math", "engine.optimize=none"]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


def bench(folder: Path, references: Path, *overrides: str) -> ResolvedRun:
    kept = [f"task.references={references}", "logger.wandb.mode=disabled", f"hydra.run.dir={folder}"]
    return compose_run([*BENCH, *REQUESTED, *kept, *overrides])


def ran(composed: ResolvedRun) -> Fidelity | None:
    """Run a bench as the command does; return the fidelity of its row."""
    execute(composed, Console(quiet=True))
    record = read_record(composed.folder)
    assert record is not None
    assert record.summary.flops_per_step is not None
    return record.fidelity


def apart(rel_l2: float) -> Difference:
    return Difference(rel_l2, rel_l2)


@pytest.mark.parametrize(
    ("claimed", "error", "floor", "meant"),
    [
        (EXACT, 1e-9, 1e-3, "broken"),
        (EQUIVALENT, 0.9e-5, 0.0, "within_floor"),
        (EQUIVALENT, 2e-5, 1e-6, "broken"),
        (EQUIVALENT, 0.02, 0.01, "within_floor"),
        (EQUIVALENT, 0.04, 0.01, "broken"),
        (EQUIVALENT, float("nan"), 0.01, "broken"),
        (APPROXIMATE, 0.02, 0.01, "within_floor"),
        (APPROXIMATE, 0.4, 0.01, "approximate"),
    ],
)
def test_verdicts(claimed: str, error: float, floor: float, meant: str) -> None:
    assert verdict(claimed, apart(error), apart(0.0), floor, floor) == meant
    assert verdict(claimed, apart(0.0), apart(error), floor, floor) == meant
    assert rounding_bound(0.0) == 1e-5


def test_the_weakest_method_decides() -> None:
    def of(*overrides: str) -> tuple[str, list[str]]:
        return method_class(compose_run([*PLAIN, *overrides]).config)

    assert of() == (EXACT, [])
    assert of("parallel=dp2") == (EXACT, [])
    assert of("attention=flash", "parallel=ring2") == (EQUIVALENT, ["attention kernel", "one image over several ranks"])
    assert of("model.dtype=bfloat16") == (EQUIVALENT, ["dtype"])
    assert of("engine.optimize=auto") == (EQUIVALENT, ["optimised network"])
    cache = Method("cache", APPROXIMATE, lambda config: config.request.steps == 3)
    assert method_class(compose_run(["request.steps=3"]).config, [*METHODS, cache])[0] == APPROXIMATE


@pytest.mark.parametrize(("layout", "name"), [("displaced2", "displaced patches"), ("pipe2", "PipeFusion")])
def test_stale_keys_are_approximate_and_the_reference_has_none(layout: str, name: str) -> None:
    row = compose_run([*PLAIN, f"parallel={layout}"]).config
    assert method_class(row) == (APPROXIMATE, [name, "one image over several ranks"])
    assert reference_config(row).parallel == floor_config(row).parallel == ParallelConfig()


def test_the_reference_is_one_rank_in_float32() -> None:
    row = compose_run(["parallel=cfg2", "attention=flash", "model.dtype=bfloat16", "request.batch_size=4"]).config
    reference, floor = reference_config(row), floor_config(row)
    for config in (reference, floor):
        assert (config.parallel.cfg, config.attention.backend, config.request.batch_size) == (1, "math", 1)
        assert config.request.steps == row.request.steps
    assert (reference.model.dtype, reference.launch.reproducible) == (DType.float32, True)
    assert (floor.model.dtype, floor.launch.reproducible) == (DType.bfloat16, False)
    assert row.parallel.cfg == 2


def test_a_plain_bench_is_within_the_floor_and_generates_its_reference_once(
    tmp_path: Path, references: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ran(bench(tmp_path / "first", references, "task.fidelity_per_step=true"))
    assert found is not None
    assert found.verdict in ("within_floor", "identical")
    assert found.steps_rel_l2 is not None
    assert len(found.steps_rel_l2) == 3
    assert found.steps_rel_l2[-1] == pytest.approx(found.latent.rel_l2)
    assert len(list(references.glob("*.safetensors"))) == 2
    monkeypatch.setattr(kept_references.ReferenceRenderer, "generate", lambda *rest: pytest.fail("drawn a second time"))
    again = ran(bench(tmp_path / "second", references, "task.fidelity_per_step=true", *PLAIN))
    assert again is not None
    assert (again.method_class, again.verdict) == ("exact", "identical")


@pytest.mark.slow
def test_bfloat16_is_rounding_and_a_wrong_scale_in_one_head_is_not(
    tmp_path: Path, references: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = "model.dtype=bfloat16"
    right = ran(bench(tmp_path / "right", references, half))
    assert right is not None
    assert right.verdict == "within_floor"
    assert right.latent.rel_l2 > 1e-4

    def wrong(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        scale = torch.ones(q_BLHD.shape[2], 1, dtype=q_BLHD.dtype)
        scale[0] = 4.0
        return sdpa_attention(q_BLHD * scale, k_BSHD, v_BSHD, mask_BS)

    monkeypatch.setattr("models.attention.sdpa.SDPA", Backend(wrong, None, lambda device, with_lse: "torch sdpa"))
    for dtype in ("bfloat16", "float32"):
        composed = bench(tmp_path / dtype, references, f"model.dtype={dtype}")
        found = ran(composed)
        assert found is not None
        assert found.verdict == "broken"
        status = read_status(composed.folder)
        assert status.state == "failed"
        assert status.error is not None
        assert status.error.startswith("broken: declared fp_equivalent (attention kernel")


def test_an_approximation_declared_exact_is_broken(tmp_path: Path, references: Path) -> None:
    """Fewer steps stand for a cache: they give another image."""
    with DiffusionGenerator.from_config(*BENCH[3:], *REQUESTED, "request.steps=2", *PLAIN) as generator:
        generated = generator.generate(latents="last")
        assert generator.info is not None
        row = MeasuredOutputs(generator.info)
    run = compose_run([*BENCH, *REQUESTED, *PLAIN, f"task.references={references}"])
    row.add(GeneratedOutput(generated.latents, generated.pixels))
    with progress_bars(Console(quiet=True)) as bars:
        for claimed, meant in ((EXACT, "broken"), (EQUIVALENT, "broken"), (APPROXIMATE, "approximate")):
            cache = Method("cache", claimed, lambda config: True)
            found, notes = measure_fidelity(run, row, ReferenceRenderer(tmp_path, bars), [*METHODS, cache])
            assert notes == []
            assert found is not None
            assert (found.verdict, found.methods) == (meant, ["cache"])


def test_a_reference_that_cannot_be_generated_is_a_note(
    tmp_path: Path, references: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of the user's own")
    composed = bench(tmp_path / "run", references, "request.seed=123")
    assert ran(composed) is None
    record = read_record(composed.folder)
    assert record is not None
    assert status_from_fidelity(record).state == "ok"
    assert any("task.fidelity=false skips it" in note for note in record.notes)
