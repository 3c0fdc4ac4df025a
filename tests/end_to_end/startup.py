"""Measure what a run costs beside its work: `python -m tests.end_to_end.startup [tries=5] [OVERRIDES]`.

Run it on an idle machine. The work is what no launcher can save: importing PyTorch, transformers and diffusers in a
fresh process, and generating, as the record has it. Both and the whole command are timed in alternation. A first
round fills the page cache and is not counted. The output is medians, with the smallest and the largest in brackets.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from harness.records.record import read_record

POLL_S = 0.002
LIBRARIES = "import torch, transformers, diffusers"
LOG_TIME = "%Y-%m-%d %H:%M:%S,%f"


class Run(NamedTuple):
    """The phases of one run of the command, in seconds and in order; `draw` is taken from the record."""

    compose: float  # from the command to a checked configuration
    start: float  # from there to a rank's first message: torchrun, and importing
    load: float  # from there to ready ranks
    generate: float
    save: float  # all other time before the first image is on disk
    end: float  # from there to the end of the command: record, ranks, table, wandb

    @property
    def first_image(self) -> float:
        """Return the time from the command to the first image on disk."""
        return sum(self[:5])


def imported() -> float:
    """Return the seconds that a fresh process needs to import the libraries."""
    began = time.time()
    subprocess.run([sys.executable, "-c", LIBRARIES], check=True)
    return time.time() - began


def run_once(folder: Path, overrides: Sequence[str]) -> Run:
    """Run the command once in a new folder."""
    began = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *overrides, f"hydra.run.dir={folder}"], stdout=subprocess.DEVNULL
    )
    while not (folder / "samples" / "0000.png").exists() and process.poll() is None:
        time.sleep(POLL_S)
    pictured = time.time()
    if process.wait():
        raise SystemExit(f"the run failed; its folder was {folder}")
    ended, record = time.time(), read_record(folder)
    assert record is not None
    composed = (folder / "config.yaml").stat().st_mtime
    said = " ".join((folder / "logs" / "rank0.log").read_text().split(maxsplit=2)[:2])
    spoken, ready = datetime.strptime(said, LOG_TIME).timestamp(), composed + record.first_call.launch_ms / 1e3
    generate = record.repeats[0].total_duration_ms / 1e3
    return Run(
        composed - began, spoken - composed, ready - spoken, generate, pictured - ready - generate, ended - pictured
    )


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    tries = 5
    overrides = sys.argv[1:]
    if overrides and overrides[0].startswith("tries="):
        tries = int(overrides.pop(0).removeprefix("tries="))
    os.environ.setdefault("WANDB_MODE", "offline")
    imports, runs = [], []
    with tempfile.TemporaryDirectory() as home:
        for number in range(tries + 1):
            imports.append(imported())
            runs.append(run_once(Path(home) / str(number), overrides))
    imports, runs = imports[1:], runs[1:]
    print(f"{LIBRARIES}: {spread(imports)} s")
    for name in Run._fields:
        print(f"  {name}: {spread([getattr(run, name) for run in runs])} s")
    print(f"first picture on disk: {spread([run.first_image for run in runs])} s")
    print(f"end of the command: {spread([sum(run) for run in runs])} s")
    ratios = [run.first_image / (alone + run.generate) for alone, run in zip(imports, runs, strict=True)]
    print(f"first picture / (imports + drawing): {spread(ratios)}")


if __name__ == "__main__":
    main()
