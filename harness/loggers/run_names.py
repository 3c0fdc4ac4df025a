"""Names of wandb runs: from the keys that vary in a sweep, or from the run's folder, and short enough for wandb."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Collection, Sequence
from pathlib import Path

from harness.config.schema import WandbConfig
from harness.loggers.columns import short_names, split_override
from harness.records.job import sweep_group

PROJECT = "triptych"
MOST = 127  # characters of a name or group; wandb takes 128
TIME = re.compile(r"\d\d-\d\d-\d\d")  # the name of a folder that says nothing without the date above it


def shorten(name: str) -> str:
    """Return a name of at most MOST characters: a longer one ends in a hash of the whole."""
    if len(name) <= MOST:
        return name
    return f"{name[: MOST - 13]}~{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def project_name(config: WandbConfig) -> str:
    """Return the project: the configured one, else WANDB_PROJECT, else triptych."""
    return config.project or os.environ.get("WANDB_PROJECT") or PROJECT


def folder_title(folder: Path) -> str:
    """Return the name of a single run: its folder's, with the date if that is a time."""
    name = folder.absolute().name
    return f"{folder.absolute().parent.name}-{name}" if TIME.fullmatch(name) else name


def job_title(given: str | None, overrides: Sequence[str], varying: Collection[str]) -> str | None:
    """Return the name of a job of a sweep: its values of the keys that vary, such as `solver=heun,steps=4`.

    Args:
        given: The user's own name, which comes first; None is WANDB_NAME.
        overrides: The job's overrides.
        varying: The keys that vary in the sweep.

    Returns:
        The name; the user's own, or None, if no key is known to vary.
    """
    rows = dict(split_override(override) for override in overrides)
    names = short_names([key for key in rows if key in varying])
    values = ",".join(f"{name}={rows[key]}" for key, name in names.items())
    given = given or os.environ.get("WANDB_NAME")
    return shorten(",".join(filter(None, (given, values)))) or None


def wandb_group(given: str | None, folder: Path) -> str:
    """Return the group of a sweep's runs.

    Args:
        given: The user's own group; None is WANDB_RUN_GROUP.
        folder: The sweep's folder.

    Returns:
        The user's group, or the last two parts of the folder, such as 2026-01-31-12-00-00.
    """
    return given or os.environ.get("WANDB_RUN_GROUP") or shorten(sweep_group(folder))


def wandb_id(folder: Path, name: str = "run_id") -> str:
    """Return the id of the wandb run of a folder, so that every command in it goes on with the same one.

    Args:
        folder: The folder; `wandb/` in it outlives another attempt at the run.
        name: Name of the file in `wandb/` that keeps the id.

    Returns:
        The id.
    """
    file = folder / "wandb" / name
    if not file.is_file():
        file.parent.mkdir(0o700, parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4))
    return file.read_text().strip()
