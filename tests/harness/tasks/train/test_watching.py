"""What a training shows: a bar with its numbers on a terminal, one log line for each point of the curve elsewhere."""

import io
import logging
import re
from pathlib import Path

import pytest
from rich.console import Console

from harness.resolve.compose import compose_run
from harness.tasks.train.entry import execute
from tests.fixtures.training import TINY


def train(folder: Path, data: Path, console: Console) -> None:
    own = [f"train.folder={folder}", f"train.data.folder={data}", "train.parts=[denoiser]", "logger=json"]
    short = ["train.denoiser.loop.images=80", "train.denoiser.loop.log_every=10", "train.denoiser.sample_every=0"]
    assert execute(compose_run([*TINY, *own, *short]), console).state == "ok"


def test_a_terminal_sees_a_bar(squares: Path, tmp_path: Path) -> None:
    written = io.StringIO()
    train(tmp_path / "run", squares, Console(file=written, force_terminal=True, width=120))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    assert re.search(r"denoiser-rectified_flow ━+ 20/20 loss \d\.\d{4}  \d+ images/s 0:00:00", shown), shown


def test_a_log_sees_the_lines_of_the_curve(
    squares: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        train(tmp_path / "run", squares, Console(force_terminal=False))
    lines = [message for message in caplog.messages if message.startswith("denoiser-rectified_flow step")]
    assert len(lines) == 2
    assert re.fullmatch(r"denoiser-rectified_flow step 20 loss \d\.\d{4} \d+ images/s", lines[1])
    assert "━" not in capsys.readouterr().out
