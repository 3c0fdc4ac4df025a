"""`from=FOLDER`: the overrides and the configurations of an earlier run, for a run that repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from harness.config.yaml import ConfigError
from harness.records.comparison import read_comparison
from harness.records.record import Record, RunFolderError, read_record, read_status
from harness.resolve.search_path import PACKAGE, PRIMARY, SearchPath

KEY = "from"
SEARCHED = "hydra.searchpath"
TOGETHER = (("request.prompt", "request.prompts"),)  # keys of which a run has one


def with_record(overrides: Sequence[str], search: SearchPath) -> tuple[list[str], SearchPath]:
    """Put the overrides of an earlier run in front of a command's own, if `from=FOLDER` is among these.

    Args:
        overrides: The command's overrides.
        search: Search path of the configurations.

    Returns:
        The overrides without from=, and the search path with the earlier run's folders.

    Raises:
        ConfigError: The folder holds no record, or the run's own configurations are gone.
    """
    named = [override.partition("=")[2] for override in overrides if override.partition("=")[0] == KEY]
    if not named:
        return list(overrides), search
    if len(named) > 1:
        raise ConfigError(f"from= names one run, not {len(named)}; run the others in commands of their own")
    folder = Path(named[0].strip("'\"")).expanduser()
    record = _record(folder)
    own = [override for override in overrides if override.partition("=")[0] != KEY]
    given = {override.partition("=")[0].lstrip("+~") for override in own} | {"rerun_of"}
    given |= {key for keys in TOGETHER for key in keys if given & {*keys}}
    declared = [override for override in record.overrides if _is_kept(override, given)]
    repeated = f"rerun_of={QuotedString(str(folder), Quote.double).with_quotes()}"
    return [*declared, *own, repeated], _search(folder, record, search)


def _is_kept(override: str, given: set[str]) -> bool:
    """Return whether an override of the earlier run holds in this one: it is not given anew, nor of Hydra itself."""
    key = override.partition("=")[0].lstrip("+~")
    return key not in given and (key == SEARCHED or key.replace("/", ".").split(".")[0] != "hydra")


def _record(folder: Path) -> Record:
    """Return the record of a folder.

    Raises:
        ConfigError: It has none; the message says what the folder holds.
    """
    try:
        record = read_record(folder)
    except RunFolderError as error:
        raise ConfigError(f"from={folder}: {error}") from error
    if record is not None:
        return record
    if not folder.is_dir():
        raise ConfigError(f"from={folder}: no such folder; it is that of a run, such as runs/DATE/TIME")
    if read_comparison(folder) is not None:
        raise ConfigError(f"from={folder}: it holds a comparison; repeat one of its two runs with from={folder / 'a'}")
    if (folder / "status.json").exists():
        status = read_status(folder)
        raise ConfigError(f"from={folder}: its run left no record ({status.state}: {status.error})")
    below = sorted(path.parent for path in folder.rglob("record.json"))
    inside = f"; there are {len(below)} in it, such as {below[0]}" if below else ""
    raise ConfigError(f"from={folder}: it holds no run{inside}")


def _search(folder: Path, record: Record, search: SearchPath) -> SearchPath:
    """Return the search path of a run that repeats another.

    Raises:
        ConfigError: A folder of configurations is gone, and the command names no other.
    """
    gone = [place for place in record.search_path if not place.startswith(PACKAGE) and not Path(place).is_dir()]
    if gone and not search.folders:
        raise ConfigError(
            f"from={folder}: its configurations came from {gone[0]}, which does not exist; add --config-dir DIR"
        )
    left = [place for place in record.search_path if place not in gone]
    primary = record.primary if search.primary == PRIMARY else search.primary
    return replace(search, folders=tuple(dict.fromkeys([*search.folders, *left])), primary=primary)
