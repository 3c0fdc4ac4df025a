"""task=serve with real ranks while the wall clock of all its processes is stepped by an hour, a day and ten years."""

import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from tests.fixtures.commands import LIMIT_S, command, ranks, started, wait_for

SOURCE = Path(__file__).parent.parent / "fixtures" / "serving" / "step_clock.c"
HOUR_S = 3600
STEPS_S = [HOUR_S, 0, -HOUR_S, 10 * 365 * 24 * HOUR_S, -24 * HOUR_S, 0]


@pytest.mark.slow
def test_a_stepped_clock_ends_and_loses_nothing(tmp_path: Path) -> None:
    compiler, library, offset, folder = shutil.which("cc"), tmp_path / "step.so", tmp_path / "offset", tmp_path / "run"
    if compiler is None:
        pytest.skip("no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    stepped = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(offset)}
    given = ["serve.port=0", "serve.timeout_s=60", "serve.keep_hours=1", f"hydra.run.dir={folder}"]
    with started(command("task=serve", *given), stepped) as process:
        assert process.stdout is not None
        found = re.search(r"http://127.0.0.1:(\d+)", process.stdout.readline())
        assert found is not None
        with httpx.Client(base_url=found[0], timeout=LIMIT_S) as client:
            wait_for(lambda: client.get("/ready").status_code == 200, "the ranks", LIMIT_S)
            pids, made = ranks(folder), []
            for seconds in STEPS_S:
                body = {"prompt": "x", "triptych": {"steps": 100}}
                made.append(client.post("/v1/requests", json=body).json()["id"])
                running = f"/v1/requests/{made[-1]}"
                wait_for(lambda path=running: client.get(path).json()["status"] == "running", "it to run", LIMIT_S)
                offset.write_text(str(seconds))
                wait_for(lambda path=running: client.get(path).json()["status"] == "done", "its image", LIMIT_S)
            answers = [client.get(f"/v1/requests/{name}").json() for name in made]
            assert [answer["status"] for answer in answers] == ["done"] * len(STEPS_S)
            for answer in answers:
                assert client.get(answer["urls"][0]).content.startswith(b"\x89PNG")
            assert client.get("/ready").json()["restarts"] == 0
            assert ranks(folder) == pids


def test_the_library_steps_the_clock(tmp_path: Path) -> None:
    compiler, library, offset = shutil.which("cc"), tmp_path / "step.so", tmp_path / "offset"
    if compiler is None:
        pytest.skip("no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    offset.write_text(str(HOUR_S))
    program = "import time, datetime; print(time.time(), datetime.datetime.now(datetime.UTC).timestamp())"
    variables = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(offset)}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
    now = datetime.now(UTC).timestamp()
    assert [round((float(word) - now) / HOUR_S, 1) for word in done.stdout.split()] == [1.0, 1.0]
