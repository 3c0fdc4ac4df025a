"""A tiny data set of squares with captions, the overrides of a tiny training, and what wandb reads back."""

from pathlib import Path

import pytest

from tests.fixtures.training import captioned


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    return captioned(tmp_path / "squares")
