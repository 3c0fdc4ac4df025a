"""The definition of a stage: a name, the fields of a Sample that it reads and writes, and a forward."""

from __future__ import annotations

from typing import Protocol

from harness.pipeline.state import RunContext, Sample


class Stage(Protocol):
    """One stage of a pipeline; it stores nothing between requests.

    Attributes:
        name: the name of the stage.
        reads: the fields of a Sample that it reads.
        writes: the fields of a Sample that it writes.
    """

    name: str
    reads: frozenset[str]
    writes: frozenset[str]

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        """Fill the fields that the stage writes, for every sample."""


def check_wiring(stages: list[Stage]) -> None:
    """Refuse an order of stages in which one reads what none before it writes.

    Args:
        stages: the stages in order.

    Raises:
        ValueError: with the stage, the field, and the stage that writes it, if any.
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
