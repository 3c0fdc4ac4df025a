"""How a run compares with the earlier one that it repeats: configuration, code and images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from harness.records.record import OF_USER, Record, Rerun, RunFolderError, read_record


def with_rerun(record: Record, folder: str | None) -> Record:
    """Return a record with its comparison with the run that it repeats, if it repeats one.

    Args:
        record: The record, with its samples.
        folder: Folder of the earlier run; None if there is none.

    Returns:
        The record; a note says so if the earlier record cannot be read any more.
    """
    if folder is None:
        return record
    try:
        earlier = read_record(Path(folder))
    except RunFolderError:
        earlier = None
    if earlier is None:
        note = f"{folder} has no record any more, so nothing is compared with it"
        return msgspec.structs.replace(record, notes=[*record.notes, note])
    return msgspec.structs.replace(record, rerun=compare_records(folder, earlier, record))


def compare_records(folder: str, earlier: Record, record: Record) -> Rerun:
    """Return what differs between an earlier run and its repetition.

    Args:
        folder: Folder of the earlier run.
        earlier: Record of the earlier run.
        record: The record of the repetition.

    Returns:
        The differences.
    """
    old, new = (dict(_leaves(each.config)) for each in (earlier, record))
    apart = (*OF_USER, "logger")
    keys = sorted(key for key in old | new if key.split(".")[0] not in apart and old.get(key) != new.get(key))
    was, now = earlier.provenance, record.provenance
    packages = sorted(name for name in was.packages | now.packages if was.packages.get(name) != now.packages.get(name))
    hashes = {row.path: row.sha256 for row in earlier.samples}
    return Rerun(
        folder=folder,
        changed=[f"{key}: {_shown(old.get(key))} -> {_shown(new.get(key))}" for key in keys],
        same_code=was.sources_sha256 == now.sources_sha256,
        packages=[f"{name}: {was.packages.get(name)} -> {now.packages.get(name)}" for name in packages],
        same_machine=was.machine == now.machine and was.world_size == now.world_size,
        images=max(len(earlier.samples), len(record.samples)),
        equal_images=sum(hashes.get(row.path) == row.sha256 for row in record.samples),
    )


def describe_rerun(row: Rerun) -> list[str]:
    """Return the comparison with the earlier run in words, one line for each part."""
    code = "the same" if row.same_code else "not the same"
    packages = f", and packages differ ({'; '.join(row.packages)})" if row.packages else ""
    machine = "" if row.same_machine else ", on another machine or number of ranks"
    return [
        f"configuration of {row.folder}: {'equal' if not row.changed else 'differs in ' + '; '.join(row.changed)}",
        f"code: {code}{packages}{machine}",
        f"images: {row.equal_images} of {row.images} are equal, by their hashes",
    ]


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of a configuration with its value."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
