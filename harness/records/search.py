"""`search.json`: what a search tried, what it measured, and the trials of which none is better in every objective."""

from __future__ import annotations

from pathlib import Path

import msgspec

from harness.records.record import write_atomically

FILE = "search.json"


class Measured(msgspec.Struct, frozen=True):
    """What one trial measured.

    Attributes:
        folder: Name of the run's folder.
        values: One value for each objective; None if it has none.
        error: Reason why it has none, in one line.
    """

    folder: str
    values: list[float] | None
    error: str | None = None


class Trial(msgspec.Struct, frozen=True):
    """One trial.

    Attributes:
        number: Number of the trial, from 0.
        params: Values that were chosen, by key.
        measured: Measurements of its run. Trials with the same values have the same run.
    """

    number: int
    params: dict[str, str]
    measured: Measured


class Search(msgspec.Struct, frozen=True):
    """A search.

    Attributes:
        objectives: Names of the objectives.
        directions: Words minimize or maximize, one for each objective.
        sampler: Name of Optuna's sampler.
        seed: Seed of the sampler.
        space: The values of each key, as they were given.
        trials: The trials in their order.
        front: Numbers of the best trials: no other one is better in an objective and as good in all others.
    """

    objectives: list[str]
    directions: list[str]
    sampler: str
    seed: int
    space: dict[str, str]
    trials: list[Trial]
    front: list[int]

    @property
    def best(self) -> list[Trial]:
        """The trials of the front, by the first objective."""
        found = [self.trials[number] for number in self.front]
        return sorted(found, key=lambda trial: (trial.measured.values or [], trial.number))


def write_search(folder: Path, search: Search) -> None:
    """Write `search.json` into a sweep's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, msgspec.json.format(msgspec.json.encode(search), indent=1))


def read_search(folder: Path) -> Search | None:
    """Return the search of a sweep's folder, or None if it has none that can be read."""
    try:
        return msgspec.json.decode((folder / FILE).read_bytes(), type=Search)
    except (OSError, msgspec.MsgspecError):
        return None
