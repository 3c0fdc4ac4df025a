"""The example package, installed into an environment of its own: in a sweep, on two ranks, and under torchrun."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from harness.records.provenance import PluginRow
from tests.fixtures.commands import LIMIT_S, QUICK, environment, hashes, record_of
from tests.fixtures.plugins import EXAMPLE

ROOT = Path(__file__).parents[2]
EULER = "scheduler/solver=example_euler"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment that has what this one has, and the example."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    Path(own, "base.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    source = shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*install, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return python


def run(python: Path, folder: Path, *arguments: str) -> str:
    """Run a command of the environment's Python in a folder, and return what it prints."""
    variables = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, *arguments], capture_output=True, text=True, timeout=2 * LIMIT_S, env=variables, cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_plugin_runs_in_a_sweep_on_two_ranks_and_under_torchrun(python: Path, tmp_path: Path) -> None:
    harness = ("-m", "harness", *QUICK)
    run(python, tmp_path, *harness, "-m", "scheduler/solver=euler,example_euler", "hydra.sweep.dir=sweep")
    jobs = {record_of(job).config["scheduler"]["solver"]["name"]: job for job in (tmp_path / "sweep").glob("*/")}
    ours = hashes(jobs["euler"])
    assert hashes(jobs["example_euler"]) == ours
    code = record_of(jobs["euler"]).provenance.plugins
    assert [(row.name, row.version) for row in code] == [("triptych_example", "0.3.1")]
    assert code[0] == PluginRow("triptych_example", "0.3.1", code[0].sha256)
    assert len(code[0].sha256) == 16

    run(python, tmp_path, *harness, EULER, "parallel=dp2", "hydra.run.dir=two")
    assert hashes(tmp_path / "two") == ours
    weaker = "plugin.example_euler.factor=0.5"
    run(python, tmp_path, *harness, EULER, "parallel=dp2", weaker, "hydra.run.dir=weaker")
    assert not set(hashes(tmp_path / "weaker").values()) & set(ours.values())

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *harness)
    run(python, tmp_path, *torchrun, EULER, "parallel=dp2", "hydra.run.dir=own")
    assert hashes(tmp_path / "own") == ours
    assert record_of(tmp_path / "own").provenance.plugins == code
    assert record_of(tmp_path / "weaker").fingerprint != record_of(tmp_path / "two").fingerprint


@pytest.mark.slow
def test_a_plugin_that_is_not_installed_everywhere_is_refused_by_name(python: Path, tmp_path: Path) -> None:
    without = subprocess.run(
        [sys.executable, "-m", "harness", EULER],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    assert without.returncode != 0
    assert "scheduler/solver=example_euler: no such option" in without.stderr
    assert [*tmp_path.iterdir()] == []
    assert "1 to 10" in run(python, tmp_path, "-m", "harness", "--help", "plugin.example_power.power")
