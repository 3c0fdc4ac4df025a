"""Real ranks on the built-in checkpoint: one thread each, few steps, every command with a time limit."""

from pathlib import Path

import pytest

from tests.fixtures.commands import command, run


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures on one rank."""
    folder = tmp_path_factory.mktemp("single") / "run"
    done = run(command("request.prompts=[rocket,red apple,pizza]", "request.seed=5", f"hydra.run.dir={folder}"))
    assert done.returncode == 0, done.stderr
    return folder
