"""Group `dataset`: a file of prompts, what is sampled of it, and the shard of this run."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.bounds import MAX_NUMBER, MAX_SEED
from schedulers.options import option

AUTO = "auto"
FORMATS = (
    AUTO,
    "text",
    "jsonl",
    "csv",
    "tsv",
    "parti_prompts",
    "drawbench",
    "geneval",
    "coco",
    "vbench",
    "mlperf_sdxl",
)
MAX_SHARDS = 100_000


@dataclass
class DatasetConfig:
    """Group `dataset`: prompts from a file. Without a file there is no data set."""

    file: str | None = option(None, "File of prompts. null = none, or for dataset=vbench that of the package vbench.")
    format: str = option(AUTO, "Format of the file; auto = by its suffix: .txt, .jsonl, .csv or .tsv.", words=FORMATS)
    sha256: str | None = option(None, "Hash (sha256) that the file must have. null = any; a run's config.yaml has it.")
    seed: int | None = option(
        None, "Seed of the sample that per_category and limit take. null = the first prompts.", low=0, high=MAX_SEED
    )
    per_category: int | None = option(None, "Prompts per category. null = all.", low=1, high=MAX_NUMBER)
    limit: int | None = option(None, "Prompts in all, over all shards. null = all.", low=1, high=MAX_NUMBER)
    shards: int = option(1, "Jobs that share the prompts.", low=1, high=MAX_SHARDS)
    shard: int = option(
        0, "Number of this job, from 0; it takes every prompt k with k % shards = shard.", low=0, high=MAX_SHARDS
    )
