"""A user's own folder of configurations on real ranks: every door, every launcher, and a record that is run again."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.client import DiffusionGenerator
from harness.records import load
from harness.records.record import read_status
from tests.fixtures.commands import LIMIT_S, command, environment, hashes, inspect, record_of, run, torchrun
from tests.fixtures.own import OWN

HERE = ["launch.mode=inprocess", "request.prompt=rocket"]
FOLDER = ["--config-dir", str(OWN)]


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run([*command(f"hydra.sweep.dir={folder}", *arguments), "-m"])


def jobs(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.rglob("status.json"))


def is_mine(folder: Path) -> bool:
    """Return whether a run used the experiment of the folder, with its model and its solver."""
    record = record_of(folder)
    found = record.config["scheduler"]["solver"]["eta"], record.config["model"]["steps"], record.config["meta"]
    return found == (0.5, 4, {"owner": "me"}) and record.search_path == [str(OWN)]


def test_a_run_of_the_users_own_is_repeated_in_a_sweep(tmp_path: Path) -> None:
    """The second command knows the folder by the record alone; one of its jobs changes a key, and says so."""
    first = run(command(*FOLDER, "experiment=mine", *HERE, f"hydra.run.dir={tmp_path / 'run'}"))
    assert first.returncode == 0, first.stderr
    assert is_mine(tmp_path / "run")
    again = sweep(tmp_path / "again", f"from={tmp_path / 'run'}", "request.steps=2,3")
    assert again.returncode == 0, again.stderr
    same, changed = (record_of(job).rerun for job in jobs(tmp_path / "again"))
    assert same is not None
    assert (same.changed, same.same_code, same.same_machine, same.images, same.equal_images) == ([], True, True, 1, 1)
    assert changed is not None
    assert (changed.changed, changed.equal_images) == (["request.steps: 2 -> 3"], 0)
    assert all(is_mine(job) for job in jobs(tmp_path / "again"))
    assert record_of(jobs(tmp_path / "again")[0]).beside == []


@pytest.mark.slow
def test_ranks_run_the_users_experiment_and_repeat_it(tmp_path: Path) -> None:
    two = ["experiment=mine", "request.prompts=[rocket,cat]", "parallel=dp2", "logger=default"]
    offline = "logger.wandb.mode=offline"
    done = run(command(*FOLDER, *two, offline, f"hydra.run.dir={tmp_path / 'run'}"))
    assert done.returncode == 0, done.stderr
    assert is_mine(tmp_path / "run")
    rows = [json.loads(line) for line in inspect(tmp_path / "run").splitlines()]
    (declared,) = [row["run"] for row in rows if row["type"] == "run"]
    assert (declared["tags"], declared["notes"]) == (["mine"], "made for the tests")
    again = run(command(f"from={tmp_path / 'run'}", f"hydra.run.dir={tmp_path / 'again'}", "logger=default"))
    assert again.returncode == 0, again.stderr
    assert "images: 2 of 2 are equal" in again.stdout
    assert f"configuration of {tmp_path / 'run'}: equal" in again.stdout


@pytest.mark.slow
def test_the_users_own_torchrun_finds_the_folder(tmp_path: Path) -> None:
    two = ["experiment=mine", "request.prompts=[rocket,cat]", "parallel=dp2"]
    flags = run([*torchrun(2, *FOLDER, *two, f"hydra.run.dir={tmp_path / 'flag'}")])
    assert flags.returncode == 0, flags.stderr
    named = environment() | {"TRIPTYCH_CONF": str(OWN)}
    arguments = torchrun(2, *two, f"hydra.run.dir={tmp_path / 'variable'}")
    variable = subprocess.run(arguments, capture_output=True, text=True, timeout=LIMIT_S, env=named)
    assert variable.returncode == 0, variable.stderr
    assert is_mine(tmp_path / "flag")
    assert is_mine(tmp_path / "variable")
    assert hashes(tmp_path / "flag") == hashes(tmp_path / "variable")
    again = run(torchrun(2, f"from={tmp_path / 'flag'}", f"hydra.run.dir={tmp_path / 'again'}"))
    assert again.returncode == 0, again.stderr
    repeated = record_of(tmp_path / "again").rerun
    assert repeated is not None
    assert (repeated.changed, repeated.equal_images) == ([], 2)


@pytest.mark.slow
def test_the_python_client_generates_from_the_folder_and_from_a_record(tmp_path: Path) -> None:
    done = run(command(*FOLDER, "experiment=mine", *HERE, f"hydra.run.dir={tmp_path / 'run'}"))
    assert done.returncode == 0, done.stderr
    threads = ["launch.threads_per_rank=1", "logger=json", *HERE]
    with DiffusionGenerator.from_config("experiment=mine", *threads, config_dir=OWN) as generator:
        one = generator.generate()
    with DiffusionGenerator.from_record(tmp_path / "run") as generator:
        other = generator.generate()
    saved = [each.save(tmp_path, "x")[0].sha256 for each in (one, other)]
    assert saved == [*hashes(tmp_path / "run").values()] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package"), [("submitit_local", "submitit"), ("joblib", "hydra_plugins.hydra_joblib_launcher")]
)
def test_jobs_of_a_launcher_find_the_folder_and_say_that_they_ran_side_by_side(
    tmp_path: Path, launcher: str, package: str
) -> None:
    if importlib.util.find_spec("hydra_plugins") is None or importlib.util.find_spec(package) is None:
        pytest.skip(f"hydra/launcher={launcher} is not installed")
    measured = ["task=bench", "task.repeats=3", "task.fidelity=false", "request.steps=20,30", *HERE]
    done = sweep(tmp_path, *FOLDER, "experiment=mine", f"hydra/launcher={launcher}", *measured)
    assert done.returncode == 0, done.stderr
    found = jobs(tmp_path)
    assert [read_status(job).state for job in found] == ["ok", "ok"]
    assert all(is_mine(job) for job in found)
    table = load(tmp_path)
    for row, other in zip(table["beside"], reversed(found), strict=True):
        assert row == [other.name]
    assert all("ran at the same time on this machine" in notes[-1] for notes in table["notes"])
    assert "beside" in done.stdout
    assert not list(tmp_path.glob(".running*"))
    assert not list(tmp_path.glob(".jobs*"))


@pytest.mark.slow
def test_a_shell_completes_the_users_options(tmp_path: Path) -> None:
    line = {"COMP_LINE": "triptych model=mi", "TRIPTYCH_CONF": str(OWN)}
    arguments = [sys.executable, "-m", "harness", "-sc", "query=bash"]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=LIMIT_S, env=os.environ | line, cwd=tmp_path
    )
    assert done.stdout.split() == ["model=mine"]
    assert list(tmp_path.iterdir()) == []
