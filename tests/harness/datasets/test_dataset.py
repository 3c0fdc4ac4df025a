"""Samples and shards of a data set: nested, in the order of the file, and every prompt in exactly one shard."""

from collections import Counter
from pathlib import Path

import pytest

from harness.config.dataset import DatasetConfig
from harness.datasets.dataset import load_dataset
from harness.datasets.prompts import DatasetError


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "prompts.csv"
    rows = [f"prompt {k},{'abc'[k % 3 if k < 24 else 0]}" for k in range(30)]
    path.write_text("prompt,category\n" + "\n".join(rows))
    return str(path)


def numbers(config: DatasetConfig) -> list[int]:
    return [prompt.index for prompt in load_dataset(config).prompts]


def test_without_a_seed_the_first_prompts_are_taken(file: str) -> None:
    assert numbers(DatasetConfig(file=file, limit=4)) == [0, 1, 2, 3]
    assert numbers(DatasetConfig(file=file, per_category=1)) == [0, 1, 2]


def test_a_seed_takes_a_sample_in_the_order_of_the_file(file: str) -> None:
    small, large = (numbers(DatasetConfig(file=file, seed=3, limit=count)) for count in (5, 12))
    assert small == sorted(small)
    assert set(small) < set(large)
    assert small != numbers(DatasetConfig(file=file, seed=4, limit=5))
    assert small != list(range(5))


def test_a_sample_has_as_many_of_each_category(file: str) -> None:
    found = load_dataset(DatasetConfig(file=file, seed=1, per_category=4)).prompts
    assert Counter(name for prompt in found for name in prompt.categories) == {"a": 4, "b": 4, "c": 4}


def test_a_file_without_categories_has_none_to_sample_from(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a\nb\n")
    with pytest.raises(DatasetError, match=r"has no categories; use dataset\.limit"):
        load_dataset(DatasetConfig(file=str(path), per_category=1))


@pytest.mark.parametrize("shards", [1, 2, 7, 30])
def test_shards_have_every_prompt_once(file: str, shards: int) -> None:
    configs = [DatasetConfig(file=file, seed=1, limit=30, shards=shards, shard=k) for k in range(shards)]
    parts = [numbers(config) for config in configs]
    assert sorted(number for part in parts for number in part) == list(range(30))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"shards": 2, "shard": 2}, "dataset.shard=2; with dataset.shards=2 give 0 to 1"),
        ({"limit": 3, "shards": 4, "shard": 3}, "give dataset.shards=3 or fewer"),
        ({"sha256": "0"}, "and dataset.sha256 is 0"),
        ({"file": "/no/such/file.txt"}, "cannot be read (No such file or directory)"),
        ({"file": "prompts.docx"}, "say what it is, such as dataset=text"),
        ({"file": None, "format": "coco"}, "dataset=coco needs its file; add dataset.file=PATH"),
        ({"file": None, "limit": 3}, "add dataset.file=PATH"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_refused(file: str, change: dict[str, object], expected: str) -> None:
    with pytest.raises(DatasetError, match=expected.replace("(", r"\(").replace(")", r"\)")):
        load_dataset(DatasetConfig(**{"file": file, **change}))  # type: ignore[arg-type]
