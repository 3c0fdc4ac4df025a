"""The records of a data set's shards, merged into one: the statistics are those of all images together.

Shards belong together if their configurations differ in `dataset.shard` alone. They are merged once all of them have
ended well; until then each is a row of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from harness.metrics.intervals import wilson
from harness.metrics.pretrained import PretrainedScores
from harness.metrics.quality import Quality
from harness.records.images import (
    FILE,
    ImageRow,
    bootstrap_estimate,
    grid_rows,
    image_statistics,
    mean_estimate,
    read_images,
)
from harness.records.record import Record, RunFolderError, SampleRow, fingerprint


@dataclass(frozen=True)
class MergedShards:
    """The shards of one data set as one run.

    Attributes:
        folders: Folders of the shards, by their number.
        record: The record over all of them.
    """

    folders: list[Path]
    record: Record


def merge_complete(records: Mapping[Path, Record]) -> list[MergedShards]:
    """Return the merged record of every data set whose shards are all among these records.

    Args:
        records: Records of runs that ended well, by folder.

    Returns:
        The merged data sets.

    Raises:
        RunFolderError: A file of images cannot be read.
    """
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    for folder, record in records.items():
        if record.dataset is not None and record.dataset.shards > 1 and (folder / FILE).is_file():
            groups[_shared_fingerprint(record.config)].setdefault(record.dataset.shard[0], folder)
    return [
        merge_shards([by_shard[number] for number in sorted(by_shard)], records)
        for by_shard in groups.values()
        if len(by_shard) == records[next(iter(by_shard.values()))].config["dataset"]["shards"]
    ]


def merge_shards(folders: Sequence[Path], records: Mapping[Path, Record]) -> MergedShards:
    """Merge the records of shards.

    Args:
        folders: Folders of the shards, by their number.
        records: Their records.

    Returns:
        The merged record: its samples are evenly chosen, its summary and categories are over all images.

    Raises:
        RunFolderError: A shard has no data set.
    """
    parts = [records[folder] for folder in folders]
    rows = [row for part in parts if (row := part.dataset) is not None]
    first = parts[0]
    if first.dataset is None or len(rows) < len(parts):
        raise RunFolderError(f"{folders[0]} has no data set; merge the shards of one")
    images = sum(row.images for row in rows)
    comm = first.summary.comm if first.summary is not None else {}
    summary, categories = image_statistics(_all_images(folders), comm, first.summary.cache if first.summary else None)
    shown = grid_rows(_all_images(folders), images)
    dataset = msgspec.structs.replace(
        first.dataset,
        prompts=sum(row.prompts for row in rows),
        images=images,
        resumed=sum(row.resumed for row in rows),
        shard=tuple(row.shard[0] for row in rows),
        categories=categories,
    )
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    record = msgspec.structs.replace(
        first,
        fingerprint=_shared_fingerprint(first.config),
        repeats=[],
        summary=summary,
        samples=[SampleRow(row.path, row.prompt, row.seed, row.sha256) for row in shown],
        notes=[*notes, f"{len(parts)} shards, merged; throughput is that of one job"],
        quality=_quality(folders, [part.quality for part in parts if part.quality is not None]),
        pretrained=_pretrained(folders, [part.pretrained for part in parts if part.pretrained is not None]),
        fidelity=None,
        profile={},
        dataset=dataset,
    )
    return MergedShards(list(folders), record)


def _all_images(folders: Sequence[Path]) -> chain[ImageRow]:
    return chain.from_iterable(read_images(folder) for folder in folders)


def _shared_fingerprint(config: dict[str, Any]) -> str:
    """Return the fingerprint that all shards have in common."""
    return fingerprint({**config, "dataset": {**config["dataset"], "shard": 0}})


def _quality(folders: Sequence[Path], parts: Sequence[Quality]) -> Quality | None:
    """Return the scores in the gallery over all images; the distance in pairs does not merge, and is left out."""
    scored = [row for row in _all_images(folders) if row.top1 is not None and row.distance is not None]
    if not scored or not parts:
        return None
    styles = [part.top1_style for part in parts if part.top1_style is not None]
    return Quality(
        gallery=parts[0].gallery,
        scored=len(scored),
        unscored=sum(part.unscored for part in parts),
        names=len({row.prompt for row in scored}),
        chance=parts[0].chance,
        top1=wilson(sum(row.top1 is True for row in scored), len(scored)),
        top5=wilson(sum(part.top5.hits for part in parts), sum(part.top5.n for part in parts)),
        top1_style=wilson(sum(s.hits for s in styles), sum(s.n for s in styles)) if styles else None,
        distance=bootstrap_estimate([row.distance or 0.0 for row in scored], np.median),
        mmd2=None,
        mmd2_real=None,
    )


def _pretrained(folders: Sequence[Path], parts: Sequence[PretrainedScores]) -> PretrainedScores | None:
    """Return the CLIP score over all images; a Frechet distance does not merge, and is left out."""
    values = [row.clip_score for row in _all_images(folders) if row.clip_score is not None]
    return PretrainedScores(parts[0].clip, mean_estimate(values), None, None) if values and parts else None
