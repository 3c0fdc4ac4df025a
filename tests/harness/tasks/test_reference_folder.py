"""The folder of the kept references, which hold a user's images."""

from pathlib import Path

import pytest
from rich.progress import Progress

from harness.resolve.compose import compose_run
from harness.tasks.common.references import ReferenceRenderer, References


def test_nobody_else_enters_the_folder_of_kept_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = compose_run(["task=bench", "request.prompt=rocket"])
    References(run, ReferenceRenderer(tmp_path, Progress())).finding("subject", lambda: None)
    folder = tmp_path / "triptych" / "references"
    assert len(list(folder.iterdir())) == 1
    assert folder.stat().st_mode & 0o077 == 0
