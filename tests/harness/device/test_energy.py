"""Energy is read where the machine reports it, across a counter's overflow, and is in the row."""

from pathlib import Path

import msgspec
import pytest

from harness.build import worker as build
from harness.client.build_record import request_energy as energy_of
from harness.client.generator import DiffusionGenerator
from harness.device.energy import PackageEnergy
from harness.messages import GenerationResult, Progress, RankReport

END_UJ = 1_000_000_000


def zone(folder: Path, name: str, kind: str, counter_uj: int) -> Path:
    """Write a zone of the kernel's powercap."""
    made = folder / name
    made.mkdir(parents=True)
    (made / "name").write_text(f"{kind}\n")
    (made / "max_energy_range_uj").write_text(f"{END_UJ}\n")
    (made / "energy_uj").write_text(f"{counter_uj}\n")
    return made


def test_all_packages_count_and_their_parts_do_not(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    second = zone(tmp_path, "intel-rapl:1", "package-1", END_UJ - 500_000)
    part = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    meter = PackageEnergy(tmp_path)
    (first / "energy_uj").write_text("3000100\n")
    (second / "energy_uj").write_text("499999\n")  # the counter has started again
    (part / "energy_uj").write_text("2000000\n")
    assert meter.used_j() == pytest.approx(3.0 + 1.0)
    meter.reset()
    assert meter.used_j() == 0.0


def test_a_machine_that_reports_nothing_says_nothing(tmp_path: Path) -> None:
    assert PackageEnergy(tmp_path).used_j() is None
    assert PackageEnergy(tmp_path / "none").used_j() is None
    (zone(tmp_path, "intel-rapl:0", "package-0", 1) / "energy_uj").unlink()
    assert PackageEnergy(tmp_path).used_j() is None


def result(*joules: float | None) -> GenerationResult:
    ranks = [RankReport(k, [], [], {}, {}, 0.0, [], [], energy_j=used) for k, used in enumerate(joules)]
    return GenerationResult("", [], ranks, 0.0)


def test_a_request_is_the_sum_of_ranks_that_report() -> None:
    row = energy_of([result(2.0, None), result(4.0, None), result(6.0, None)])
    assert row is not None
    assert (row.median, row.n) == (4.0, 3)
    both = energy_of([result(2.0, 3.0)])
    assert both is not None
    assert both.median == 5.0
    assert energy_of([result(None, None)]) is None


def test_a_row_has_it_where_the_machine_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0) / "energy_uj"
    monkeypatch.setattr(build, "PackageEnergy", lambda: PackageEnergy(tmp_path))
    requested = ["launch.mode=inprocess", "launch.threads_per_rank=1", "request.steps=2", "request.prompt=rocket"]

    def spend(progress: Progress) -> None:
        counter.write_text(f"{1_000_000 * (1 + progress.done)}\n")

    with DiffusionGenerator.from_config(*requested) as generator:
        generated = generator.generate(on_progress=spend)
        record = generated.record
    assert record.summary is not None
    assert record.summary.energy_j is not None
    assert record.summary.energy_j.median >= 1.0
    assert msgspec.json.decode(msgspec.json.encode(record), type=type(record)) == record
