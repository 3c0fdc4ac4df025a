"""The tiny data set that the tests of training share."""

from pathlib import Path

import pytest

from tests.fixtures.training import captioned


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    return captioned(tmp_path / "squares")
