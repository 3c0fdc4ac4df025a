"""What a stage is: a name, what it reads and writes of a Sample, and a forward over this rank's samples."""

from __future__ import annotations

from typing import Protocol

from harness.pipeline.state import RunContext, Sample


class Stage(Protocol):
    """One stage of a pipeline; it keeps nothing between requests."""

    name: str
    reads: frozenset[str]
    writes: frozenset[str]

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        """Fills the fields it writes, for every sample."""


def check_wiring(stages: list[Stage]) -> None:
    """Refuses an order of stages in which one reads what none before it writes.

    Raises:
        ValueError: the stage, the field, and who writes it (if anybody).
    """
    known = set(Sample.__dataclass_fields__)
    ready = {"spec"}
    for stage in stages:
        foreign = sorted((stage.reads | stage.writes) - known)
        if foreign:
            raise ValueError(f"stage {stage.name} names {foreign[0]}, which a Sample does not have")
        for field in sorted(stage.reads - ready):
            writers = [other.name for other in stages if field in other.writes]
            where = f"put {' or '.join(writers)} before it" if writers else "no stage writes it"
            raise ValueError(f"stage {stage.name} reads {field} before it is written; {where}")
        ready |= stage.writes
