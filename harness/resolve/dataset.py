"""The data set of a run: its file is read and every prompt checked before a process starts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

from harness.config.bounds import MAX_IMAGES, MAX_SEED
from harness.config.schema import RunConfig, Task
from harness.config.tasks import TRAITS
from harness.datasets.dataset import ENTRIES, Dataset, is_given, load_dataset
from harness.datasets.prompts import DatasetPrompt
from harness.datasets.trace import read_trace, trace_sha256
from harness.resolve.limits import MAX_PROMPT_CHARS

SINGLE = ("fidelity", "profile", "trace")  # keys of task that belong to one request


def resolve_dataset(config: RunConfig) -> None:
    """Read the data set that a configuration names, and take its prompts into the request, in place.

    A task that makes a request of each prompt has the first one in its request, for the checks of every request.
    Another task has all of them.

    Args:
        config: The configuration.

    Raises:
        ValueError: The file or the combination cannot be used; one line says what to change.
    """
    request, given = config.request, config.dataset
    if request.prompts_file is not None:
        if given.file is not None:
            raise ValueError("give request.prompts_file or dataset.file, not both: they are the same")
        given.file, request.prompts_file = request.prompts_file, None
    if not is_given(given):
        return
    traits = TRAITS[config.task.name]
    if not traits.reads_dataset:
        names = " or ".join(task.name for task in Task if TRAITS[task].reads_dataset)
        raise ValueError(f"dataset has an effect with task={names} only; add one, or drop dataset.*")
    if request.prompt is not None or request.prompts is not None:
        raise ValueError("the prompts come from dataset.file; drop request.prompt and request.prompts")
    found = load_dataset(given)
    given.file, given.format, given.sha256 = str(found.file), found.format, found.sha256
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    for prompt in found.sample:
        if len(prompt.prompt) > MAX_PROMPT_CHARS:
            raise ValueError(
                f"{at_line(found, prompt)}: a prompt of {len(prompt.prompt)} characters; shorten it to "
                f"{MAX_PROMPT_CHARS} or fewer"
            )
    if traits.streams_dataset:
        check_stream(config, found)
        request.prompts = [found.sample[0].prompt]
    elif traits.serves:
        request.prompts = [found.prompts[0].prompt]
    else:
        check_one_request(config, found)
        request.prompts = [prompt.prompt for prompt in found.prompts]


def streamed_dataset(config: RunConfig) -> Dataset | None:
    """Return the data set that a run generates image by image; None if it has none."""
    streams = TRAITS[config.task.name].streams_dataset and is_given(config.dataset)
    return load_dataset(config.dataset) if streams else None


def resolve_trace(config: RunConfig) -> None:
    """Read the trace that task=load replays, and write the hash of its file into the configuration, in place.

    Args:
        config: The configuration.

    Raises:
        ValueError: The file cannot be used, or is another one; one line says what to change.
    """
    load = config.load
    if load.trace is None or config.task.name is not Task.load:
        return
    read_trace(load.trace)
    digest = trace_sha256(load.trace)
    if load.trace_sha256 not in (None, digest):
        raise ValueError(
            f"load.trace={load.trace} has the sha256 {digest}, and load.trace_sha256 is {load.trace_sha256}"
        )
    load.trace_sha256 = digest


def loaded_dataset(config: RunConfig) -> Dataset | None:
    """Return the data set whose prompts the clients of task=load send in turn; None if there is none."""
    is_sent = TRAITS[config.task.name].serves and is_given(config.dataset)
    return load_dataset(config.dataset) if is_sent else None


def at_line(dataset: Dataset, prompt: DatasetPrompt) -> str:
    """Return the place of a prompt, for a message."""
    return f"dataset.file={dataset.file}: {'entry' if dataset.format in ENTRIES else 'line'} {prompt.line}"


def check_stream(config: RunConfig, dataset: Dataset) -> None:
    """Refuse what a stream of requests does not have, and seeds beyond the largest one.

    Args:
        config: The configuration.
        dataset: The data set.

    Raises:
        ValueError: One line says what to change.
    """
    for key in SINGLE:
        if getattr(config.task, key):
            raise ValueError(
                f"task.{key}=true belongs to one request, and a data set is many; use task=bench with dataset.limit=16"
            )
    last = config.request.seed + dataset.sample[-1].index * config.request.samples_per_prompt
    if last > MAX_SEED:
        raise ValueError(
            f"request.seed={config.request.seed}: prompt {dataset.sample[-1].index} would have seed {last}"
        )


def check_one_request(config: RunConfig, dataset: Dataset) -> None:
    """Refuse a data set whose prompts are not one request.

    Args:
        config: The configuration.
        dataset: The data set.

    Raises:
        ValueError: One line says what to change.
    """
    task, count = config.task.name.name, len(dataset.prompts)
    if count > MAX_IMAGES:
        raise ValueError(
            f"task={task} takes {MAX_IMAGES} prompts of a data set, not {count}; add dataset.limit={MAX_IMAGES}"
        )
    own = next((prompt for prompt in dataset.prompts if prompt.has_own_request), None)
    if own is not None:
        raise ValueError(
            f"{at_line(dataset, own)} has a seed, size or negative prompt of its own, which only task=generate uses; "
            f"take those columns out for task={task}"
        )


def own_requests(config: RunConfig, dataset: Dataset) -> Iterator[tuple[DatasetPrompt, RunConfig]]:
    """Yield one configuration for every size that only the data set has, so that it is checked like the request's own.

    Args:
        config: The configuration.
        dataset: The data set.

    Yields:
        The first prompt of that size, and the configuration of its request.
    """
    seen = {(config.request.height, config.request.width)}
    for prompt in dataset.sample:
        size = prompt.height or config.request.height, prompt.width or config.request.width
        if size not in seen:
            seen.add(size)
            yield prompt, replace(config, request=replace(config.request, height=size[0], width=size[1]))


def all_prompts(dataset: Dataset) -> list[str]:
    """Return the distinct prompts and negative prompts of a data set."""
    own = (prompt.negative_prompt for prompt in dataset.sample if prompt.negative_prompt)
    return [*dict.fromkeys([*(prompt.prompt for prompt in dataset.sample), *own])]
