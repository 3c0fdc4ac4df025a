"""`scheduler=published`: the noise scheduler of the checkpoint's own scheduler_config.json."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from harness.config.schema import SchedulerConfig
from models.files import CheckpointError, read_json
from schedulers.published import check_published


def scheduler_file(folder: Path) -> Path:
    """Return the file in which a checkpoint in the diffusers layout states its noise scheduler.

    Args:
        folder: The checkpoint's folder.

    Returns:
        The file in `scheduler/`, or at the top if the checkpoint consists of one folder.
    """
    file, top = folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"
    return top if top.is_file() and not file.is_file() else file


def check_published_scheduler(config: SchedulerConfig, folder: Path, steps: int | None) -> None:
    """Refuse a checkpoint without a noise scheduler that can run, and keys that would have no effect beside it.

    Args:
        config: The `scheduler` group.
        folder: The checkpoint's folder.
        steps: The number of steps, if known.

    Raises:
        CheckpointError: The checkpoint states no noise scheduler, or one that is not supported.
        ValueError: A key has no effect, or the number of steps is impossible; one line says what to change.
    """
    file = scheduler_file(folder)
    if not file.is_file():
        raise CheckpointError(f"{file}: not there; choose scheduler=rectified_flow, ddpm or sgm")
    content = read_json(file)
    try:
        check_published(content)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; choose scheduler=rectified_flow, ddpm or sgm") from None
    check_published(content, steps)
    plain = SchedulerConfig()
    given = [f.name for f in fields(config) if f.name != "family" and getattr(config, f.name) != getattr(plain, f.name)]
    if given:
        raise ValueError(
            f"scheduler.{given[0]} has no effect beside the checkpoint's own noise scheduler ({file.name}); choose "
            "scheduler=rectified_flow, ddpm or sgm to set it"
        )
