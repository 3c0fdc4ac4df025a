"""What the rest of the code must know of a task: one row of traits each, so that nothing else asks which task it is."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.schema import Task

OWN_PROCESSES = "starts its own processes"


@dataclass(frozen=True)
class TaskTraits:
    """The traits of one task.

    Attributes:
        is_run: True for a task with a model, a request and a folder for its status.
        generates: True if it generates with the configured network, so that caches and quantization have an effect.
        uses_checkpoint: True if it uses a checkpoint and an engine.
        only_shapes: True if it uses only the shapes of the network, for every layout.
        reads_dataset: True if its prompts may come from a data set.
        streams_dataset: True if it generates a data set image by image, in place of one request.
        measures: Whether times are its result: operations are counted, the device's rate is measured, and prompts are
            encoded at every request.
        serves: Whether its ranks take many requests at once.
        mirrored: Whether its results go to wandb.
        compared_as: Task of each of the two configurations that it compares; None if it compares nothing.
        folder: Key of the folder that it works in, in place of a run's folder.
        not_swept: Reason why it cannot be swept.
        not_under_torchrun: Reason why it cannot run under the user's own torchrun.
    """

    is_run: bool = True
    generates: bool = True
    uses_checkpoint: bool = True
    only_shapes: bool = False
    reads_dataset: bool = False
    streams_dataset: bool = False
    measures: bool = False
    serves: bool = False
    mirrored: bool = True
    compared_as: Task | None = None
    folder: str | None = None
    not_swept: str | None = None
    not_under_torchrun: str | None = OWN_PROCESSES


TRAITS = {
    Task.generate: TaskTraits(reads_dataset=True, streams_dataset=True, not_under_torchrun=None),
    Task.bench: TaskTraits(reads_dataset=True, measures=True, not_under_torchrun=None),
    Task.compare: TaskTraits(reads_dataset=True, compared_as=Task.bench),
    Task.train: TaskTraits(generates=False, uses_checkpoint=False, folder="train.folder"),
    Task.plan: TaskTraits(generates=False, only_shapes=True, mirrored=False),
    Task.report: TaskTraits(
        is_run=False,
        generates=False,
        uses_checkpoint=False,
        not_swept="makes one page over all runs",
        not_under_torchrun="generates nothing, so it has no ranks",
    ),
    Task.serve: TaskTraits(serves=True, mirrored=False, not_swept="runs until it is stopped"),
    Task.load: TaskTraits(reads_dataset=True, serves=True, compared_as=Task.load),
}

KEYS_OF_TASKS = {
    "compare.a": (Task.compare, Task.load),
    "compare.b": (Task.compare, Task.load),
    "report.runs": (Task.report,),
    "report.out": (Task.report,),
    "plan.runs": (Task.plan,),
}
"""Keys that are null by default and have an effect in these tasks only."""
