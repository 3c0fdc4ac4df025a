"""A data set: a file's prompts, the sample of them that a configuration takes, and the shard of one job.

A larger sample with the same seed contains the smaller one, and a sample keeps the order of the file. Prompt k of the
file has the seed `request.seed + k * request.samples_per_prompt`, whatever is sampled and whichever job generates it.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config.dataset import AUTO, DatasetConfig
from harness.datasets.prompts import DatasetError, DatasetPrompt
from harness.datasets.readers import SUFFIXES, parse, unused_fields

ENTRIES = ("coco", "vbench")  # formats of one JSON value, whose entries are counted and not its lines
VBENCH_FILE = "VBench_full_info.json"


@dataclass(frozen=True)
class Dataset:
    """The prompts that a run takes of a file.

    Attributes:
        file: The file.
        format: Format of the file.
        sha256: Hash of its bytes.
        total: Number of prompts in the file.
        sample: Prompts that the configuration takes, over all shards, in the order of the file.
        prompts: Prompts of this job's shard.
        notes: Notes for the user.
    """

    file: Path
    format: str
    sha256: str
    total: int
    sample: list[DatasetPrompt]
    prompts: list[DatasetPrompt]
    notes: list[str]


def is_given(config: DatasetConfig) -> bool:
    """Return whether a configuration names a data set."""
    return config != DatasetConfig()


def load_dataset(config: DatasetConfig) -> Dataset:
    """Read, sample and shard the prompts of a file.

    Args:
        config: The `dataset` group.

    Returns:
        The data set.

    Raises:
        DatasetError: The file cannot be used, or nothing is left for this shard; one line says what to change.
    """
    if config.shard >= config.shards:
        raise DatasetError(
            f"dataset.shard={config.shard}; with dataset.shards={config.shards} give 0 to {config.shards - 1}"
        )
    file = dataset_file(config)
    form = dataset_format(config, file)
    content = _read(file)
    digest = hashlib.sha256(content).hexdigest()
    if config.sha256 is not None and config.sha256 != digest:
        raise DatasetError(f"dataset.file={file} has the sha256 {digest}, and dataset.sha256 is {config.sha256}")
    text = decode(content, file)
    try:
        prompts = parse(text, form)
        unused = unused_fields(text, form)
    except DatasetError as error:
        reason = str(error).replace("line ", "entry ", 1) if form in ENTRIES else str(error)
        raise DatasetError(f"dataset.file={file}: {reason}") from error
    if config.per_category is not None and not any(prompt.categories for prompt in prompts):
        raise DatasetError(
            f"dataset.per_category={config.per_category}, but {file} has no categories; use dataset.limit"
        )
    chosen = sample(prompts, config)
    own = chosen[config.shard :: config.shards]
    if not own:
        raise DatasetError(
            f"dataset.shard={config.shard} of {config.shards} is empty: there are {len(chosen)} prompts; give "
            f"dataset.shards={len(chosen)} or fewer"
        )
    notes = [f"fields of {file.name} that have no effect: {', '.join(unused)}"] if unused else []
    return Dataset(file, form, digest, len(prompts), chosen, own, notes)


def dataset_file(config: DatasetConfig) -> Path:
    """Return the file of a data set.

    Args:
        config: The `dataset` group.

    Returns:
        The path of the file.

    Raises:
        DatasetError: There is no file.
    """
    if config.file is not None:
        return Path(config.file).expanduser()
    if config.format == "vbench":
        found = importlib.util.find_spec("vbench")
        if found is None or found.origin is None:
            raise DatasetError(
                f"dataset=vbench needs dataset.file={VBENCH_FILE}, or its package: pip install --no-deps vbench"
            )
        return Path(found.origin).parent / VBENCH_FILE
    if config.format != AUTO:
        raise DatasetError(f"dataset={config.format} needs its file; add dataset.file=PATH")
    plain = vars(DatasetConfig())
    given = [f"dataset.{key}={value}" for key, value in vars(config).items() if value != plain[key]]
    verb = "have" if len(given) > 1 else "has"
    raise DatasetError(f"{', '.join(given)} {verb} no effect without a file of prompts; add dataset.file=PATH")


def dataset_format(config: DatasetConfig, file: Path) -> str:
    """Return the format of a file, by its suffix if the configuration gives none.

    Args:
        config: The `dataset` group.
        file: The file.

    Returns:
        The format.

    Raises:
        DatasetError: The suffix is unknown.
    """
    if config.format != AUTO:
        return config.format
    form = SUFFIXES.get(file.suffix.lower())
    if form is None:
        raise DatasetError(
            f"dataset.file={file} does not end in {', '.join(SUFFIXES)}; say what it is, such as dataset=text"
        )
    return form


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DatasetError(f"dataset.file={file} cannot be read ({error.strerror})") from error


def decode(content: bytes, file: Path) -> str:
    """Return the text of a file in UTF-8, without a byte order mark.

    Args:
        content: Bytes of the file.
        file: The file, for the message.

    Returns:
        The text.

    Raises:
        DatasetError: The bytes are no UTF-8; the message has the line.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DatasetError(f"dataset.file={file}: line {line} is not UTF-8; save the file as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DatasetError(f"dataset.file={file}: line {line} has a zero byte; give a file of text in UTF-8")
    return text


def sample(prompts: Sequence[DatasetPrompt], config: DatasetConfig) -> list[DatasetPrompt]:
    """Return the prompts that a configuration takes, in the order of the file.

    A prompt of several categories counts in each of them. So with per_category=n, a category that shares prompts with
    another one can have more than n.

    Args:
        prompts: All prompts.
        config: The `dataset` group.

    Returns:
        The sample.
    """
    order = list(prompts) if config.seed is None else sorted(prompts, key=lambda p: _rank(config.seed or 0, p.index))
    if config.per_category is not None:
        order = _per_category(order, config.per_category)
    return sorted(order[: config.limit], key=lambda prompt: prompt.index)


def _per_category(order: Sequence[DatasetPrompt], count: int) -> list[DatasetPrompt]:
    found: list[DatasetPrompt] = []
    counts: Counter[str] = Counter()
    for prompt in order:
        names = prompt.categories or ("",)
        if any(counts[name] < count for name in names):
            found.append(prompt)
            counts.update(names)
    return found


def _rank(seed: int, index: int) -> bytes:
    """Return the place of a prompt in the random order of a seed, which no version of a library changes."""
    return hashlib.sha256(f"{seed}:{index}".encode()).digest()
