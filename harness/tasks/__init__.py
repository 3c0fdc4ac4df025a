"""The tasks: one entry each, a module that is imported when its task is chosen."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

from harness.config.schema import Task

if TYPE_CHECKING:
    from rich.console import Console

    from harness.engines.pool import MakeEngine
    from harness.records.record import Status
    from harness.resolve.compose import ResolvedRun

ENTRIES = {
    Task.generate: "harness.tasks.generate",
    Task.bench: "harness.tasks.bench",
    Task.compare: "harness.tasks.compare",
    Task.train: "harness.tasks.train.entry",
    Task.plan: "harness.tasks.plan.entry",
    Task.report: "harness.tasks.report.entry",
    Task.serve: "harness.tasks.serve.entry",
    Task.load: "harness.tasks.load.entry",
}


class TaskEntry(Protocol):
    """What the command needs of a task."""

    def check(self, run: ResolvedRun) -> None:
        """Refuse keys of this task that cannot run, before a folder is claimed.

        Args:
            run: The resolved run.

        Raises:
            ConfigError: A key of this task is wrong.
        """

    def execute(self, run: ResolvedRun, console: Console, engines: MakeEngine) -> Status:
        """Do the task in its folder; a failure becomes the status.

        Args:
            run: The resolved run.
            console: Console for the progress and the results.
            engines: Function that returns the run's engine, new or still warm from an earlier job.

        Returns:
            The status, which is on disk.

        Raises:
            RunFolderError: Another run is in the folder.
            ConfigError: Something that is only known now is wrong; no folder was claimed.
        """


def task_entry(task: Task) -> TaskEntry:
    """Import and return the entry of a task."""
    return cast(TaskEntry, importlib.import_module(ENTRIES[task]))
