"""The path from the command to the network can be read in one sitting: few frames of the project are on the stack."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.commands import environment

MOST = {"solver": 12, "network": 15}
"""The most frames of the project above the first solver step, and above the network's first forward."""
SHORT = ["request.prompt=rocket", "request.steps=2", "logger=json", "launch.threads_per_rank=1"]
BENCH = ["task=bench", "task.fidelity=false", "task.repeats=1"]


@pytest.mark.parametrize(
    ("role", "overrides"),
    [("command", ["launch.mode=inprocess"]), ("command", [*BENCH, "launch.mode=inprocess"]), ("rank", [])],
    ids=["generate", "bench", "rank"],
)
def test_the_path_to_the_network_is_short(role: str, overrides: list[str], tmp_path: Path) -> None:
    file = tmp_path / "stacks.json"
    arguments = [role, str(file), *SHORT, *overrides, f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fixtures.stacks", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    stacks = json.loads(file.read_text())
    assert set(stacks) == set(MOST)
    shown = "\n".join(
        f"{len(frames)} frames at the {name}:\n  " + "\n  ".join(frames) for name, frames in stacks.items()
    )
    assert all(len(stacks[name]) <= most for name, most in MOST.items()), shown
