"""What a user sees outside a checkout: an installed copy, a sweep on real ranks, and the overhead of the harness."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import harness
from harness.records import load
from harness.records.provenance import sources_hash
from harness.resolve.packages import VERSIONS
from tests.fixtures.commands import LIMIT_S, QUICK, difference, environment, record_of, run

ROOT = Path(__file__).parent.parent.parent


OURS = ("models", "schedulers", "conf", "torch", "yaml")
"""Names that a user's folder may have for packages of its own."""
OLDEST = "TRIPTYCH_OLDEST_PYTHON"
"""A variable with the Python of an environment that has the oldest torch of pyproject.toml."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs of a fresh environment with this project's wheel, and with the other packages of this one."""
    folder = tmp_path_factory.mktemp("installed")
    left = shutil.ignore_patterns(".git", ".venv", "runs", "sweeps", "wandb", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", ignore=left)
    shutil.rmtree(folder / "source" / "build", ignore_errors=True)  # of an earlier build, and not harness/build
    pip, fresh = [sys.executable, "-m", "pip"], folder / "fresh"
    build = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run(build, check=True, timeout=300)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    install = [*pip, "--python", str(fresh / "bin" / "python"), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    (site,) = fresh.glob("lib/python*/site-packages")
    others = [entry for entry in sys.path if entry.endswith("site-packages")]
    (site / "others.pth").write_text(
        "\n".join(others)
    )  # their own .pth files, such as an editable install's, are not read
    return fresh / "bin"


def run_away(command: list[str], away: Path) -> str:
    """Return what a command prints in a folder that has packages of our names, each of which fails to import."""
    for name in OURS:
        (away / name).mkdir(exist_ok=True, parents=True)
        (away / name / "__init__.py").write_text(f"raise ImportError('the {name} of the working folder')")
    variables = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=away, env=variables, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [["triptych"], ["python", "-m", "harness"]], ids=["program", "module"])
def test_a_wheel_runs_in_a_folder_with_packages_of_the_same_names(
    installed: Path, tmp_path: Path, command: list[str]
) -> None:
    program = [str(installed / command[0]), *command[1:]]
    assert run_away([*program, "--version"], tmp_path).strip() == harness.__version__
    images = []
    for name, layout in (("one", "single"), ("two", "dp2")):
        overrides = [*QUICK, "request.prompts=[rocket,red apple]", f"parallel={layout}", f"hydra.run.dir={name}"]
        run_away([*program, *overrides], tmp_path)
        done = record_of(tmp_path / name)
        assert done.provenance.git is None  # the wheel, not this checkout
        assert done.provenance.packages["triptych"] == harness.__version__
        assert done.provenance.sources_sha256 == sources_hash(ROOT)  # no source is missing from it
        images.append([row.sha256 for row in done.samples])
    assert images[0] == images[1]


@pytest.mark.slow
def test_a_wheel_has_its_types_its_pages_and_its_licences(installed: Path, tmp_path: Path) -> None:
    (site,) = installed.parent.glob("lib/python*/site-packages")
    code = "import triptych; print(triptych.__version__)"
    variables = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    said = subprocess.run([str(installed / "python"), "-c", code], cwd=tmp_path, env=variables, capture_output=True)
    assert said.stdout.decode().strip() == harness.__version__, said.stderr
    assert [(site / name / "py.typed").exists() for name in ("triptych", "harness", "models", "schedulers")] == [
        True
    ] * 4
    assert len(list((site / "harness" / "tasks" / "serve").glob("page.*"))) == 3
    (metadata,) = site.glob("triptych-*.dist-info")
    assert (metadata / "licenses" / "LICENSE").exists()
    assert "Data and licences" in (metadata / "licenses/models/reference/emoji/README.md").read_text()


@pytest.mark.slow
def test_the_oldest_torch_generates_the_images_of_this_one(tmp_path: Path) -> None:
    """The newest torch of pyproject.toml is that of .ci/constraints.txt, with which all tests run."""
    python = os.environ.get(OLDEST)
    if python is None:
        pytest.skip(f"{OLDEST} names no Python with torch {VERSIONS['torch'][0]}")
    for name, program in (("old", python), ("new", sys.executable)):
        requested = ["request.prompt=rocket", "engine.optimize=none", f"hydra.run.dir={tmp_path / name}"]
        done = run([program, "-m", "harness", *QUICK, *requested])
        assert done.returncode == 0, done.stderr
    found = record_of(tmp_path / "old").provenance.packages["torch"]
    assert found is not None
    assert found.startswith(f"{VERSIONS['torch'][0]}.")
    assert difference(tmp_path / "old", tmp_path / "new") <= 1


@pytest.mark.slow
def test_the_level_of_logs_is_that_of_the_ranks_too(tmp_path: Path) -> None:
    lines = {}
    for level in ("info", "warning"):
        folder = tmp_path / level
        run([sys.executable, "-m", "harness", *QUICK, f"logger.level={level}", f"hydra.run.dir={folder}"])
        lines[level] = [line for line in (folder / "logs" / "rank0.log").read_text().splitlines() if " INFO " in line]
    assert len(lines["info"]) > len(lines["warning"]) == 0


@pytest.mark.slow
def test_a_sweep_on_real_ranks(tmp_path: Path) -> None:
    overrides = ["scheduler/solver=euler,heun", "request.steps=4,8", "request.prompt=rocket", "parallel=dp2"]
    done = run(
        [sys.executable, "-m", "harness", "-m", *QUICK[:1], *QUICK[2:], *overrides, f"hydra.sweep.dir={tmp_path}"]
    )
    assert done.returncode == 0, done.stderr
    table = load(tmp_path)
    assert list(table["state"]) == ["ok"] * 4
    assert sorted(table["summary.nfe"]) == [4, 7, 8, 15]


@pytest.mark.slow
@pytest.mark.skipif(os.cpu_count() == 1, reason="the client and the rank share one core")
def test_the_harness_costs_little_beside_the_networks(tmp_path: Path) -> None:
    """At 20 steps the median share outside the networks is a few percent; the bound leaves room for a busy machine."""
    command = [
        sys.executable,
        "-m",
        "harness",
        "task=bench",
        "request.prompt=rocket",
        "request.steps=20",
        "logger=json",
    ]
    done = run([*command, "launch.threads_per_rank=1", f"hydra.run.dir={tmp_path / 'run'}"])
    assert done.returncode == 0, done.stderr
    summary = record_of(tmp_path / "run").summary
    assert summary.latency_ms.n == 5
    assert 0 < summary.overhead_share.median < 0.1
