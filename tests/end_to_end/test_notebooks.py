"""Every notebook runs from its first cell to its last on small sweeps made here, and plots."""

import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.fixtures.commands import environment, run

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
COMMON = ["launch.threads_per_rank=1", "logger=json"]
BENCH = ["-m", "task=bench", "task.repeats=2", "request.prompt=rocket", "request.steps=2"]
SWEEPS = {
    "families": [
        *["-m", "launch.mode=inprocess", "request.prompts=[rocket,pizza]", "request.steps=2,4"],
        *["scheduler=rectified_flow,ddpm", "scheduler/solver=ddim"],
    ],
    "scaling": [*BENCH, "parallel=single,ulysses2", "engine.optimize=none"],
    "load": ["-m", "task=load", "load.rate=2,8", "load.duration_s=2", "request.steps=1", "load.warmup_s=0.5"],
    "fidelity": [*BENCH, "launch.mode=inprocess", "attention=math,sdpa,flash"],
}
PLOTTED = {"families": 2, "load": 1, "scaling": 1, "fidelity": 1, "roofline": 1}


def harness(*overrides: str) -> None:
    done = run([sys.executable, "-m", "harness", *overrides, *COMMON])
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name, axes in SWEEPS.items():
        kept = [] if name in ("families", "load") else [f"task.references={root / 'references'}"]
        harness(*axes, *kept, f"hydra.sweep.dir={root / name}")
    (root / "roofline").symlink_to(root / "scaling")
    planned = ["task=plan", "hardware=measured", f"plan.runs={root / 'scaling'}", f"hydra.run.dir={root / 'plan'}"]
    harness(*planned)
    (root / "plan").rename(root / "scaling" / "plan")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_a_notebook_runs_and_plots(name: str, runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outputs = outputs_of(name, runs / name, monkeypatch, tmp_path)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PLOTTED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PLOTTED))
def test_a_notebook_goes_on_without_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outputs = outputs_of(name, tmp_path, monkeypatch, tmp_path)
    assert any("Nothing to show: " in output.get("text", "") for output in outputs)


def outputs_of(name: str, runs: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Any]:
    """Execute a notebook over a tree of runs; return its outputs, of which none is an error or on stderr."""
    monkeypatch.setenv("TRIPTYCH_RUNS", str(runs))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    return outputs
