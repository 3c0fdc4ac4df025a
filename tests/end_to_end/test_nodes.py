"""One run over two torchrun agents, each in a folder of its own, as on machines that share no file system."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import harness
from tests.fixtures.commands import ENDLESS, LIMIT_S, agents, difference, environment, record_of, status_of
from tests.fixtures.faults import planted

REQUESTED = ["request.prompts=[rocket,red apple,pizza]", "request.seed=5", "parallel=ulysses2", "hydra.run.dir=run"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@contextmanager
def nodes(tmp_path: Path, overrides: list[str], variables: dict[str, str]) -> Iterator[list[tuple[Path, str, int]]]:
    """Return each node's folder, output and exit status after both have ended."""
    folders, running = [tmp_path / "first", tmp_path / "second"], []
    try:
        for folder, agent in zip(folders, agents(2, free_port(), *overrides), strict=True):
            folder.mkdir()
            log = (tmp_path / f"{folder.name}.log").open("w")
            running.append(subprocess.Popen(agent, cwd=folder, stdout=log, stderr=log, env=environment() | variables))
        for process in running:
            process.wait(timeout=LIMIT_S)
        printed = [(tmp_path / f"{folder.name}.log").read_text() for folder in folders]
        yield list(zip(folders, printed, [process.returncode for process in running], strict=True))
    finally:
        for process in running:
            process.kill()
            process.wait(timeout=LIMIT_S)


@pytest.mark.slow
def test_two_nodes_generate_the_same_and_one_of_them_keeps_it(single: Path, tmp_path: Path) -> None:
    with nodes(tmp_path, REQUESTED, {"PYTHONPATH": str(Path(harness.__file__).parent.parent)}) as ended:
        assert [status for _, _, status in ended] == [0, 0], ended
        (kept,) = [folder / "run" for folder, _, _ in ended if any(folder.iterdir())]
    assert [path.name for path in (kept / "logs").iterdir()] == ["rank0.log"]
    assert difference(single, kept) <= 1
    provenance = record_of(kept).provenance
    assert (provenance.world_size, provenance.hosts) == (2, [socket.gethostname()] * 2)


@pytest.mark.slow
def test_a_rank_that_ends_on_another_node_ends_both(tmp_path: Path) -> None:
    with nodes(tmp_path, [*REQUESTED, ENDLESS], planted(tmp_path, "raises")) as ended:
        (kept,) = [folder / "run" for folder, _, _ in ended if any(folder.iterdir())]
        (other,) = [printed for folder, printed, _ in ended if not any(folder.iterdir())]
        assert all(status != 0 for _, _, status in ended)
    assert "rank 1 of node 1: planted fault" in other
    assert status_of(kept).state == "failed"
