"""A run that several end-to-end tests compare with."""

from pathlib import Path

import pytest

from tests.fixtures.commands import command, run


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run on one rank with three images."""
    folder = tmp_path_factory.mktemp("single") / "run"
    done = run(command("request.prompts=[rocket,red apple,pizza]", "request.seed=5", f"hydra.run.dir={folder}"))
    assert done.returncode == 0, done.stderr
    return folder
