"""The page of task=report as an artifact of a wandb run of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from harness.config.schema import WandbConfig, WandbMode
from harness.loggers.artifacts import log_files
from harness.loggers.declared import used_config
from harness.loggers.run_names import folder_title, wandb_id
from harness.loggers.wandb import connected_mode, open_run, resolve_mode


def log_report(config: WandbConfig, page: Path, declared: Mapping[str, object]) -> None:
    """Log a report that is on disk; a new one of the same folder is the next version of the same artifact.

    Args:
        config: The `logger.wandb` group; with mode=auto nothing is kept offline.
        page: The report's file; `wandb/` is beside it.
        declared: The configuration.
    """
    if config.mode is WandbMode.auto and resolve_mode(config.mode) != "online":
        return
    mode = connected_mode(config.mode)
    if mode == "disabled":
        return
    folder, title = page.parent, f"{folder_title(page.parent)}-report"
    run_id = wandb_id(folder, "report_id")
    with open_run(config, mode, folder, "report", used_config(declared), title, run_id) as run:
        log_files(run, "report", folder, [page.name])
        run.summary.update({"state": "ok"})
