"""What a server keeps: sizes and ages hold, the oldest goes first, and a disk that takes nothing is said and heals."""

import errno
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.config.serve import ServeConfig
from harness.messages import GenerationRequest
from harness.records.record import RunFolder, read_status
from harness.tasks.serve import housekeeping, storage
from harness.tasks.serve.housekeeping import Housekeeping
from harness.tasks.serve.serve import ServerLog
from tests.fixtures.faults import largest_file
from tests.fixtures.serving.virtual_time import VirtualTime


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    (tmp_path / "samples").mkdir()
    return tmp_path


def keeper(folder: Path, clock: Callable[[], float] = time.monotonic, **serve: float) -> Housekeeping:
    return Housekeeping(ServeConfig(**{"keep_mib": 1, **serve}), folder, clock)  # type: ignore[arg-type]


def sample(folder: Path, name: str, kib: int) -> Path:
    path = folder / "samples" / f"{name}-00.png"
    path.write_bytes(os.urandom(kib << 10))
    return path


def entry(name: str) -> storage.RequestLogEntry:
    return storage.RequestLogEntry(GenerationRequest(name, ["x"], 1, 1.0, 8, 8), "ok", 0.0, None, None)


def ids(file: Path) -> list[str]:
    return [json.loads(line)["request"]["request_id"] for line in file.read_text().splitlines()]


def test_the_oldest_images_and_dead_logs_go_when_there_is_too_much(folder: Path) -> None:
    kept = keeper(folder)
    kept.keep("a", [sample(folder, "a", 300)])
    (folder / "logs" / "died1").mkdir()
    (folder / "logs" / "died1" / "rank0.log").write_bytes(bytes(os.urandom(300 << 10)))
    kept.check()
    kept.keep("b", [sample(folder, "b", 300)])
    assert len(list(folder.rglob("*.png"))) == 2
    kept.keep("c", [sample(folder, "c", 300)])
    assert sorted(path.name for path in folder.rglob("*.png")) == ["b-00.png", "c-00.png"]
    assert (folder / "logs" / "died1").exists()
    kept.keep("d", [sample(folder, "d", 300)])
    assert not (folder / "logs" / "died1").exists()
    kept.drop("b")
    assert sorted(path.name for path in folder.rglob("*.png")) == ["c-00.png", "d-00.png"]
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert total <= 1 << 20


def test_the_newest_is_kept_even_if_it_is_too_much(folder: Path) -> None:
    kept = keeper(folder)
    kept.keep("small", [sample(folder, "small", 10)])
    kept.keep("large", [sample(folder, "large", 2000)])
    kept.check()
    assert [path.name for path in folder.rglob("*.png")] == ["large-00.png"]


def test_what_is_old_goes_by_a_clock_that_nobody_sets(folder: Path) -> None:
    clock = VirtualTime()
    kept = keeper(folder, clock.now, keep_hours=1.0)
    kept.keep("a", [sample(folder, "a", 1)])
    clock.time_s += 1800
    kept.keep("b", [sample(folder, "b", 1)])
    clock.time_s += 1801
    os.utime(folder / "samples" / "b-00.png", (0, 0))  # as after a step of the wall clock
    kept.check()
    assert [path.name for path in folder.rglob("*.png")] == ["b-00.png"]
    assert kept.trouble == ""


def test_a_log_that_is_being_written_loses_its_older_half(folder: Path) -> None:
    log = folder / "logs" / "rank0.log"
    with log.open("a") as file:
        for number in range(40_000):
            file.write(f"line {number}\n")
        file.flush()
        keeper(folder).check()
        assert log.stat().st_size <= (1 << 20) // 4
        file.write("the last\n")
    assert log.read_text().endswith("line 39999\nthe last\n")


def test_logs_that_go_away_while_they_are_looked_at_are_no_trouble(folder: Path) -> None:
    for name in ("rank0.log", "died1"):  # the next ranks begin, and old logs are removed
        (folder / "logs" / name).unlink(missing_ok=True)
        (folder / "logs" / name).symlink_to(folder / "gone")
    kept = keeper(folder)
    kept.check()
    assert kept.trouble == ""


def test_lines_are_whole_and_the_file_rotates(folder: Path) -> None:
    threads = [
        threading.Thread(target=lambda k=k: [storage.append_entry(folder, entry(f"{k}-{n}"), 4000) for n in range(20)])
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = [folder / storage.ROTATED_FILE, folder / storage.REQUESTS_FILE]
    assert all(0 < file.stat().st_size <= 4000 for file in files)
    assert all(ids(file) for file in files)
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600, 0o600]


def test_one_line_waits_for_another(folder: Path) -> None:
    file = folder / storage.REQUESTS_FILE
    with file.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=storage.append_entry, args=(folder, entry("a")))
        thread.start()
        thread.join(0.2)
        assert file.read_bytes() == b""
    thread.join()
    assert ids(file) == ["a"]


def test_a_torn_line_is_cut_off_at_the_next_one(folder: Path) -> None:
    file = folder / storage.REQUESTS_FILE
    for torn in (b"", b'{"request": {"req', b"x" * 200_000):
        file.write_bytes(b"" if not torn else file.read_bytes() + torn)
        storage.append_entry(folder, entry(f"after {len(torn)}"))
    assert ids(file) == ["after 0", "after 17", "after 200000"]


def test_a_short_write_leaves_no_part_of_a_line(folder: Path) -> None:
    file = folder / storage.REQUESTS_FILE
    storage.append_entry(folder, entry("a"))
    whole = file.read_bytes()
    with largest_file(len(whole) + 20), pytest.raises(OSError, match="large"):
        storage.append_entry(folder, entry("b"))
    assert file.read_bytes() == whole
    storage.append_entry(folder, entry("c"))
    assert ids(file) == ["a", "c"]


def test_a_disk_that_takes_nothing_is_said_in_one_line_and_heals(folder: Path) -> None:
    kept = keeper(folder)
    with largest_file(housekeeping.PROBE_BYTES // 2):
        kept.check()
    assert "cannot be written" in kept.trouble
    assert "free some disk space" in kept.trouble
    kept.check()
    assert kept.trouble == ""
    assert not (folder / housekeeping.PROBE).exists()


def test_a_removed_folder_is_made_again_and_logs_go_on(tmp_path: Path) -> None:
    owned = RunFolder.claim(tmp_path / "run")
    owned.write_config("model: emoji\n")
    kept, log = keeper(owned.path), ServerLog(owned.path / "logs" / "server.log")
    kept.restore = lambda: owned.restore("model: emoji\n")
    log.emit(_line("before"))
    shutil.rmtree(owned.path)
    log.emit(_line("lost"))
    kept.check()
    log.emit(_line("after"))
    log.close()
    assert kept.trouble == ""
    assert (owned.path / "config.yaml").read_text() == "model: emoji\n"
    assert read_status(owned.path).state == "failed"
    assert (owned.path / "logs" / "server.log").read_text() == "after\n"
    assert owned.path.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_again_is_a_reason(tmp_path: Path) -> None:
    kept = keeper(tmp_path / "run")

    def restore() -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    kept.restore = restore
    kept.check()
    assert "Read-only file system" in kept.trouble


def _line(text: str) -> logging.LogRecord:
    return logging.LogRecord("x", logging.INFO, "", 0, text, (), None)


PRIVATE = """
import os, sys
from pathlib import Path
import numpy as np
from harness.records.media import save_png
from harness.records.record import RunFolder, Status
os.umask(0)
folder = RunFolder.claim(Path(sys.argv[1]))
folder.write_config("x: 1")
folder.finish(Status("ok"))
save_png(folder.path / "a.png", np.zeros((8, 8, 3), np.uint8), {})
"""


def test_nobody_else_reads_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(0o755)
    subprocess.run([sys.executable, "-c", PRIVATE, str(tmp_path / "run")], check=True)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir()}
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert {name: modes[name] for name in ("config.yaml", "status.json", "a.png", "logs")} == {
        "config.yaml": 0o600,
        "status.json": 0o600,
        "a.png": 0o600,
        "logs": 0o700,
    }
