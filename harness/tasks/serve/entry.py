"""task=serve: serve requests over HTTP until the server is stopped."""

from __future__ import annotations

from rich.console import Console

from harness.engines.pool import MakeEngine, new_engine
from harness.records.record import RunFolder, Status
from harness.resolve.compose import ResolvedRun
from harness.tasks.common.lifecycle import guarded


def check(run: ResolvedRun) -> None:
    """Refuse a server that other machines would reach without a key; the rest was checked as it was composed."""
    from harness.tasks.serve.access import read_keys

    read_keys(run.config.serve)


def execute(run: ResolvedRun, console: Console, engines: MakeEngine = new_engine) -> Status:
    """Serve until the server is stopped; any failure becomes the status.

    The server listens on its address before the folder is claimed, so an address in use leaves no folder behind.

    Args:
        run: The resolved run.
        console: Not used; the server prints on the terminal itself.
        engines: Not used; the supervisor starts its own ranks again after a failure.

    Returns:
        The status, which is on disk.

    Raises:
        RunFolderError: Another run is in the folder.
        ConfigError: The address is taken, does not belong to this machine, or needs a key.
    """
    from harness.tasks.serve.access import read_keys
    from harness.tasks.serve.serve import listen, serve

    keys = read_keys(run.config.serve)
    with listen(run.config.serve) as listening:
        folder = RunFolder.claim(run.folder, run.retry)
        with guarded(run, folder) as outcome:
            outcome.status = serve(run, folder, listening, keys=keys)
    return outcome.status
