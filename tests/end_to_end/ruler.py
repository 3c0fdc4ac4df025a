"""Check the benchmark itself: `python -m tests.end_to_end.ruler [itself] [slower] [benches]`.

Run it on an idle machine; it takes some 40 minutes. It makes three checks:

- itself: a run is compared with itself twenty times (experiment=self). It counts how many comparisons report no
  difference.
- slower: a run is compared with one of 5 % more steps, in enough rounds for a noisy machine. The difference must be
  found.
- benches: one bench is run five times, and that is done three times. It counts how often a median lies in the printed
  interval of another bench of its five. For exact 95 % intervals this holds for 83 % of the pairs.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

from harness.metrics.paired import Ratio
from harness.metrics.summary import Summary
from harness.records.comparison import read_comparison
from harness.records.record import read_record

COMMON = ("logger=json", "logger.table=false", "launch.threads_per_rank=1", "request.prompt=rocket")
BENCH = ("-m", "task=bench", "task.fidelity=false", "task.repeats=20", "request.seed=range(5)")
ROUNDS = "task.repeats=80"


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "harness", *arguments], check=True, stdout=subprocess.DEVNULL)


def ratios(folder: Path) -> list[Ratio]:
    """Return the ratio of whole-request times of every comparison below a folder."""
    found = [read_comparison(file.parent) for file in sorted(folder.rglob("comparison.json"))]
    return [comparison.ratios["request"] for comparison in found if comparison is not None]


def with_itself(folder: Path) -> None:
    run("-m", "experiment=self", "logger=json", f"hydra.sweep.dir={folder}")
    rows = ratios(folder)
    same = sum(not row.differs for row in rows)
    spread = sorted(row.ratio for row in rows)
    print(f"compared with itself: no difference in {same} of {len(rows)}; ratios {spread[0]:.4f} to {spread[-1]:.4f}")


def with_a_slower_one(folder: Path) -> None:
    run(
        "task=compare",
        "compare.a=[]",
        "compare.b=[request.steps=21]",
        "request.steps=20",
        ROUNDS,
        *COMMON,
        f"hydra.run.dir={folder}",
    )
    row = ratios(folder)[0]
    low, high = row.interval
    found = "found" if row.differs else "not found"
    print(
        f"20 against 21 steps: ratio {row.ratio:.4f} ({low:.4f} to {high:.4f}), {found}; {row.detectable:.1%} would be"
    )


def five_benches(folder: Path) -> None:
    pairs: list[tuple[Summary, Summary]] = []
    for time in range(3):
        swept = folder / str(time)
        run(*BENCH, *COMMON, f"hydra.sweep.dir={swept}")
        found = [read_record(file.parent) for file in sorted(swept.rglob("record.json"))]
        rows = [record.summary.latency_ms for record in found if record is not None]
        for row in rows:
            print(f"bench: median {row.median:.1f} ms, {row.spread_name} {row.spread[0]:.1f} to {row.spread[1]:.1f}")
        pairs += itertools.permutations(rows, 2)
    inside = sum(one.spread[0] <= other.median <= one.spread[1] for one, other in pairs)
    print(f"a median lies in another's interval in {inside} of {len(pairs)} pairs ({inside / len(pairs):.0%})")


PARTS = {"itself": with_itself, "slower": with_a_slower_one, "benches": five_benches}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        for part in sys.argv[1:] or PARTS:
            PARTS[part](Path(name) / part)


if __name__ == "__main__":
    main()
