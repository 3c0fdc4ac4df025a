"""How busy the machine was: read from the kernel, without the ranks and the client, and a note if it was."""

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from harness.client.build_record import BUSY_CORES, BUSY_SHARE, WAITED_SHARE, machine_load, machine_notes, waiting_notes
from harness.device.usage import MachineUsage, ProcessUsage, thread_times, waited_share
from harness.messages import RankReport
from harness.records.record import MachineLoad, Repeat
from tests.fixtures.records import record


def report(rank: int, cpu_s: float | None, switches: int = 0) -> RankReport:
    """Return the report of a rank that used this CPU time."""
    return RankReport(rank, [], [], {}, {}, 0.0, [], [], cpu_s=cpu_s, involuntary_switches=switches)


def repeat(other_cores: float, steal_share: float = 0.0, duration_ms: float = 100.0) -> Repeat:
    """Return a repeat beside which this was running."""
    load = MachineLoad(1.0, 0, other_cores, steal_share, 3.5)
    return msgspec.structs.replace(record().repeats[0], machine=load, client_duration_ms=duration_ms)


def test_the_use_of_a_process_is_its_cpu_time() -> None:
    before, start = ProcessUsage.now(), time.process_time()
    while time.process_time() - start < 0.1:
        pass
    used = ProcessUsage.now().since(before)
    assert used.cpu_s == pytest.approx(time.process_time() - start, abs=0.05)
    assert used.involuntary_switches >= 0


def test_the_use_of_the_machine_is_read_from_the_kernel(tmp_path: Path) -> None:
    rate, stat = os.sysconf("SC_CLK_TCK"), tmp_path / "stat"
    stat.write_text("cpu  100 10 50 9999 77 3 2 5 40 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n")
    before = MachineUsage.now(stat)
    stat.write_text("cpu  130 10 60 20000 88 4 4 9 40 0\n")
    used = MachineUsage.now(stat).since(before)
    assert used.busy_s == pytest.approx(
        43 / rate
    )  # user, system and both kinds of interrupts, not idle, iowait, steal or guest
    assert used.steal_s == pytest.approx(4 / rate)
    assert used.wall_s > 0
    missing = MachineUsage.now(tmp_path / "none")
    assert (missing.busy_s, missing.steal_s) == (None, None)


def test_other_processes_are_what_neither_ranks_nor_client_used() -> None:
    watched = MachineUsage(wall_s=2.0, busy_s=5.0, steal_s=0.1, client_s=0.5)
    found = machine_load([report(0, 1.5, 3), report(1, 1.0, 4)], watched, hosts=1)
    assert found is not None
    assert (found.rank_cores, found.involuntary_switches) == (1.25, 7)
    assert found.other_cores == pytest.approx(1.0)  # (5 - 1.5 - 1 - 0.5) / 2
    assert found.steal_share == pytest.approx(0.05 / (os.cpu_count() or 1))
    several = machine_load([report(0, 1.5), report(1, 1.0)], watched, hosts=2)
    assert several is not None
    assert several.other_cores is None  # the ranks of another machine are not in this machine's count
    assert machine_load([report(0, 1.0), report(1, None)], watched, hosts=1) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_a_process_beside_the_client_is_seen() -> None:
    """It needs no idle machine: what is seen is at least what the process itself used."""
    before = MachineUsage.now()
    spin = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
    watched = MachineUsage.now().since(before)
    found = machine_load([report(0, 0.0)], watched, hosts=1)
    assert found is not None
    assert found.other_cores is not None
    assert found.other_cores * watched.wall_s > 0.4


def test_a_busy_machine_is_noted_and_an_idle_one_is_not() -> None:
    cores = os.cpu_count() or 1
    limit = max(BUSY_CORES, BUSY_SHARE * cores)
    assert machine_notes([repeat(0.9 * limit), repeat(0.0)]) == []
    assert machine_notes([record().repeats[0]]) == []  # not watched
    (busy,) = machine_notes([repeat(0.0), repeat(4 * limit)])
    assert f"used {2 * limit:.2g} of its {cores} processors" in busy
    assert "load average up to 3.5" in busy
    assert machine_notes([repeat(4 * limit, duration_ms=1.0), repeat(0.0, duration_ms=99.0)]) == []  # one tick too many
    (stolen,) = machine_notes([repeat(0.0, 0.02), repeat(0.0, 0.01)])
    assert "1.5%" in stolen
    assert machine_notes([repeat(0.0, 0.01)]) == []


WAITER = """
import os, sys
os.sched_setaffinity(0, [int(sys.argv[1])])
print(1, flush=True)
while True:
    pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads schedstat")
def test_two_processes_on_one_processor_wait_half_of_their_time() -> None:
    core = str(min(os.sched_getaffinity(0)))
    command = [sys.executable, "-c", WAITER, core]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        assert all(process.stdout is not None and process.stdout.readline() for process in processes)
        before = [ProcessUsage.of(process.pid) for process in processes]
        time.sleep(1.0)
        after = [ProcessUsage.of(process.pid) for process in processes]
        used = [b.since(a) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    share = waited_share([(part.cpu_s, part.waited_s) for part in used])
    assert share is not None
    assert share > 0.4  # more beside the work of others
    assert thread_times(processes[0].pid) is None  # it has ended


def test_ranks_that_waited_for_processors_are_noted() -> None:
    assert waited_share([(3.0, 1.0), (3.0, 1.0)]) == 0.25
    assert waited_share([(3.0, None)]) is None
    assert waiting_notes(WAITED_SHARE) == waiting_notes(None) == []
    watched = MachineUsage(wall_s=2.0, busy_s=5.0, steal_s=0.0, client_s=0.5)
    reports = [msgspec.structs.replace(report(rank, 1.0), waited_s=rank * 0.5) for rank in range(2)]
    found = machine_load(reports, watched, hosts=1)
    assert found is not None
    assert found.waited_share == pytest.approx(0.2)
    repeats = [msgspec.structs.replace(record().repeats[0], machine=MachineLoad(1.0, 0, waited_share=0.2))]
    assert "had no processor in 20% of the time" in machine_notes(repeats)[0]
