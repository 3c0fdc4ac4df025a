"""Two configurations in alternation from the command line: equal ones are called equal, a real difference is found."""

import shutil
from pathlib import Path

import pytest

from harness.records import load
from harness.records.comparison import read_comparison
from tests.fixtures.commands import command, record_of, run, status_of

pytestmark = pytest.mark.slow
COMMON = ["task=compare", "task.repeats=10", "launch.threads_per_rank=1", "request.prompts=[rocket,pizza]"]


def test_a_comparison_leaves_both_rows_and_what_they_say(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    sides = ["compare.a=[request.steps=3]", "compare.b=[request.steps=3,parallel=dp2]"]
    done = run(command(*COMMON, *sides, f"hydra.run.dir={folder}"))
    assert done.returncode == 0, done.stderr
    found = read_comparison(folder)
    assert found is not None
    assert (found.a, found.b) == (["request.steps=3"], ["request.steps=3", "parallel=dp2"])
    assert found.output is not None
    assert found.output.identical
    assert found.ranks == (1, 2)
    assert found.efficiency is not None
    request = found.ratios["request"]
    assert found.efficiency["request"] == pytest.approx(request.ratio / 2)
    assert request.interval[0] <= request.ratio <= request.interval[1]
    for side, ranks in (("a", 1), ("b", 2)):
        record = record_of(folder / side)
        assert status_of(folder / side).state == "ok"
        assert len(record.repeats) == 10
        assert len(record.summary.peak_memory_mib) == ranks
    assert sorted(load(folder)["state"]) == ["ok", "ok", "ok"]


def test_four_times_the_steps_are_found_and_change_the_image(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run(
        command(*COMMON, "compare.a=[request.steps=4]", "compare.b=[request.steps=16]", f"hydra.run.dir={folder}")
    )
    assert done.returncode == 0, done.stderr
    found = read_comparison(folder)
    assert found is not None
    assert found.ratios["denoising"].differs
    assert found.ratios["denoising"].ratio < 0.5
    assert found.output is not None
    assert not found.output.identical
    assert found.output.rel_l2 > 0.001
    assert found.efficiency is None


def test_a_configuration_that_dies_fails_the_comparison_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = ["compare.a=[request.steps=2]", "compare.b=[request.steps=2,launch.start_timeout_s=0.01]"]
    done = run(command(*COMMON, *overrides, f"hydra.run.dir={folder}"))
    assert done.returncode == 1
    assert status_of(folder).state == "failed"
    assert read_comparison(folder) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fault_in_the_kernel_of_one_side_fails_the_comparison(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the code whose sdpa scales its scores by 1.01; a and b differ in nothing but their kernel."""
    root, copy, folder = Path(__file__).parents[2], tmp_path / "copy", tmp_path / "run"
    for package in ("conf", "harness", "models", "schedulers"):
        shutil.copytree(root / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    kernel = copy / "models/attention/sdpa.py"
    right = kernel.read_text()
    wrong = right.replace("q_BLHD.transpose(1, 2), k_BSHD", "1.01 * q_BLHD.transpose(1, 2), k_BSHD")
    assert wrong != right
    kernel.write_text(wrong)
    common = ["task=compare", "task.repeats=8", "launch.threads_per_rank=1", "request.prompts=[rocket]"]
    kept = [f"model.dtype={dtype}", "request.steps=3", f"task.references={tmp_path}/references", "logger=json"]
    sides = ["compare.a=[attention=math]", "compare.b=[attention=sdpa]", f"hydra.run.dir={folder}"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(copy))
    done = run(command(*common, *kept, *sides))
    assert done.returncode == 1, done.stderr
    found = read_comparison(folder)
    assert found is not None
    assert found.verdicts["a"] in ("identical", "within_floor")
    assert found.verdicts["b"] == "broken"
    assert [status_of(folder / side).state for side in ("a", "b")] == ["ok", "failed"]
    assert "b is broken: declared fp_equivalent" in (status_of(folder).error or "")
