"""A data set, image by image: each one is on disk and in `images.jsonl` before the next request, and none is kept.

A command that was cut off goes on after the images that it has, in the same folder and with the same configuration.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console

from harness.client.build_record import cache_notes, cache_use, hub_commit_note, overhead_share
from harness.client.generator import DiffusionGenerator, Generation
from harness.client.score_images import score_images
from harness.config.schema import RequestConfig
from harness.config.yaml import to_dict
from harness.datasets.dataset import Dataset
from harness.datasets.prompts import DatasetPrompt
from harness.engines.pool import MakeEngine
from harness.loggers.images import ImageMirror
from harness.loggers.table import print_record
from harness.loggers.wandb import log_run, mode_notes
from harness.messages import CacheSkips, CollectiveTraffic, total_sent_bytes
from harness.records.images import ImageLog, ImageRow, RequestTimes, grid_rows, image_statistics, read_images
from harness.records.media import grid
from harness.records.record import DatasetRow, Record, RunFolder, SampleRow, Status, fingerprint
from harness.resolve.compose import ResolvedRun
from harness.tasks.common.imports import import_in_background, modules_for_saving
from harness.tasks.common.lifecycle import guarded, mirror
from harness.tasks.common.progress import progress_bars
from harness.tasks.common.session import MeasurementSession

MOST_NOTES = 20  # distinct notes of requests that a record repeats


@dataclass(frozen=True)
class PromptGroup:
    """The prompts of one request: their images have one size and one negative prompt.

    Attributes:
        prompts: The prompts.
        height: Height in pixels.
        width: Width in pixels.
        negative_prompt: The negative prompt.
    """

    prompts: list[DatasetPrompt]
    height: int
    width: int
    negative_prompt: str


def stream(run: ResolvedRun, dataset: Dataset, console: Console, engines: MakeEngine, folder: RunFolder) -> Status:
    """Generate a data set, write each image at once, then the record; any failure becomes the status.

    Args:
        run: The resolved run.
        dataset: The data set.
        console: Console for the progress and the table.
        engines: Function that returns the run's engine, new or still warm from an earlier job.
        folder: The claimed folder.

    Returns:
        The status, which is on disk before the last results are logged to wandb.
    """
    config = run.config
    with guarded(run, folder) as outcome, progress_bars(console, config.logger.progress) as bars:
        run = replace(run, notes=[*run.notes, *mode_notes(config.logger.wandb.mode)])
        generator = DiffusionGenerator.from_resolved(run, folder.path, engines)
        session = MeasurementSession(generator, bars)
        with ImageLog(folder.path) as log:
            images = ImageStream(run, dataset, folder.path, log)
            if images.resumed:
                console.print(f"going on after {images.resumed} of {images.total} images that {folder.path} has")
            try:
                with import_in_background(modules_for_saving(config)):
                    session.start()
                with ImageMirror(config.logger.wandb, folder.path, run.config, images.total) as mirrored:
                    bar = bars.add_task("generating", total=images.total, completed=images.resumed)
                    for rows in images.generate(generator):
                        mirrored.add(rows)
                        bars.update(bar, advance=len(rows))
                measured = generator.base_record()
            finally:
                generator.stop()
        scores = score_images(folder.path, run.checkpoint.folder, config.quality, config.plugin)
        if mirrored.error is not None:
            scores.reasons.append(f"wandb has not all images: {mirrored.error}")
        record = images.record(measured, scores.reasons)
        record = msgspec.structs.replace(
            record, quality=scores.quality, pretrained=scores.pretrained, metrics=scores.metrics
        )
        folder.write_record(record)
    if outcome.status.state != "ok":
        console.print(f"the same command goes on after its images with hydra.run.dir={folder.path}", soft_wrap=True)
        return outcome.status
    if config.logger.table:
        print_record(record, folder.path, console)
    mirror(partial(log_run, config.logger.wandb, record, folder.path, config.task.name.name, outcome.status))
    return outcome.status


class ImageStream:
    """The images of a data set that are not on disk yet.

    Args:
        run: The resolved run.
        dataset: The data set.
        folder: The run's folder.
        log: The file of its images.

    Attributes:
        total: Number of images.
        resumed: Number of images that were on disk.
    """

    def __init__(self, run: ResolvedRun, dataset: Dataset, folder: Path, log: ImageLog) -> None:
        self._run = run
        self._dataset = dataset
        self._folder = folder
        self._log = log
        self._fingerprint = fingerprint(to_dict(run.config))
        self._notes: dict[str, None] = {}
        self._skips: list[CacheSkips] = []
        self._comm: dict[str, dict[str, CollectiveTraffic]] = {}
        self.total = len(dataset.prompts) * run.config.request.samples_per_prompt
        self.resumed = len(log.done)

    def generate(self, generator: DiffusionGenerator) -> Iterator[list[ImageRow]]:
        """Generate what is missing, one request after another.

        Args:
            generator: The generator, whose ranks are ready.

        Yields:
            The rows of each request's images, which are on disk.
        """
        (self._folder / "samples").mkdir(0o700, exist_ok=True)
        request = self._run.config.request
        size = request.batch_size * self._run.config.parallel.dp
        for group in prompt_groups(self._dataset.prompts, request, size):
            if all(number in self._log.done for prompt in group.prompts for number in self._numbers(prompt)):
                continue
            generation = generator.generate(
                prompts=[prompt.prompt for prompt in group.prompts],
                seeds=[self._seed(prompt) for prompt in group.prompts],
                negative_prompt=group.negative_prompt,
                height=group.height,
                width=group.width,
            )
            self._note(generation)
            yield self._save(group, generation)

    def _numbers(self, prompt: DatasetPrompt) -> range:
        """Return the numbers of a prompt's images in the whole data set."""
        count = self._run.config.request.samples_per_prompt
        return range(prompt.index * count, (prompt.index + 1) * count)

    def _seed(self, prompt: DatasetPrompt) -> int:
        first = self._run.config.request.seed + self._numbers(prompt)[0]
        return first if prompt.seed is None else prompt.seed

    def _note(self, generation: Generation) -> None:
        for rank in generation.result.ranks:
            new = [note for note in rank.notes if "prompt cache" not in note]  # another one for every request
            self._notes.update(dict.fromkeys(new[: max(0, MOST_NOTES - len(self._notes))]))
        self._skips = [skips for rank in generation.result.ranks for skips in rank.skips]
        self._comm = max((rank.comm for rank in generation.result.ranks), key=total_sent_bytes)

    def _save(self, group: PromptGroup, generation: Generation) -> list[ImageRow]:
        """Write the images of one answer, and then their lines."""
        images = [(prompt, number) for prompt in group.prompts for number in self._numbers(prompt)]
        duration_ms = generation.result.total_duration_ms / len(images)
        times: RequestTimes | None = request_times(self._run, generation)
        rows = []
        for k, (prompt, number) in enumerate(images):
            if number in self._log.done:
                continue
            saved = generation.save_sample(k, self._folder, self._fingerprint, f"{number:06d}")
            row = ImageRow(
                index=number,
                id=prompt.id,
                categories=prompt.categories,
                prompt=prompt.prompt,
                negative_prompt=group.negative_prompt,
                seed=saved.seed,
                height=group.height,
                width=group.width,
                path=saved.path,
                sha256=saved.sha256,
                duration_ms=duration_ms,
                request=times,
            )
            times = None
            self._log.append(row)
            rows.append(row)
        return rows

    def record(self, base: Record, notes: Sequence[str]) -> Record:
        """Return the record of all images, those of earlier commands included, and write the grid.

        Args:
            base: The record of the run before anything was measured.
            notes: Further notes.

        Returns:
            The record, without scores over all images.
        """
        folder, dataset = self._folder, self._dataset
        summary, categories = image_statistics(read_images(folder), self._comm, cache_use(self._skips))
        shown = grid_rows(read_images(folder), self.total)
        write_grid(folder, shown)
        row = DatasetRow(
            file=str(dataset.file),
            format=dataset.format,
            sha256=dataset.sha256,
            total=dataset.total,
            sample=len(dataset.sample),
            prompts=len(dataset.prompts),
            images=self.total,
            resumed=self.resumed,
            shards=self._run.config.dataset.shards,
            shard=(self._run.config.dataset.shard,),
            categories=categories,
        )
        config = self._run.config
        more = [
            *hub_commit_note(config.model, self._run.checkpoint.folder),
            *cache_notes(config.cache, config.model.name, self._skips),
        ]
        more += [f"{self.resumed} of {self.total} images are those of earlier commands"] if self.resumed else []
        if self.total > len(shown):
            more.append(f"the grid has {len(shown)} of {self.total} images; images.jsonl lists all")
        return msgspec.structs.replace(
            base,
            summary=summary,
            samples=[SampleRow(each.path, each.prompt, each.seed, each.sha256) for each in shown],
            dataset=row,
            notes=[*base.notes, *self._notes, *more, *notes],
        )


def prompt_groups(prompts: Sequence[DatasetPrompt], request: RequestConfig, size: int) -> Iterator[PromptGroup]:
    """Yield the prompts of each request: consecutive ones of one size and negative prompt, at least one.

    Args:
        prompts: The prompts.
        request: The `request` group, which fills in what a prompt leaves open.
        size: Number of images in a request, as far as its prompts allow.

    Yields:
        The groups in the order of the prompts.
    """
    most = max(1, size // request.samples_per_prompt)
    group: PromptGroup | None = None
    for prompt in prompts:
        own = PromptGroup(
            [prompt],
            prompt.height or request.height or 0,
            prompt.width or request.width or 0,
            (request.negative_prompt or "") if prompt.negative_prompt is None else prompt.negative_prompt,
        )
        if group is not None and len(group.prompts) < most and replace(group, prompts=[prompt]) == own:
            group.prompts.append(prompt)
            continue
        if group is not None:
            yield group
        group = own
    if group is not None:
        yield group


def request_times(run: ResolvedRun, generation: Generation) -> RequestTimes:
    """Return the times of one answer, as its line has them.

    Args:
        run: The resolved run.
        generation: The answer.

    Returns:
        The times.
    """
    repeat, ranks = generation.repeat, generation.result.ranks
    cache = cache_use([skips for rank in ranks[:: run.replica_size] for skips in rank.skips])
    evaluations = sum(rank.network_evaluations.get("denoiser", 0) for rank in ranks[:: run.replica_size])
    batches = -(-len(generation.result.samples) // run.config.request.batch_size)
    energies = [rank.energy_j for rank in ranks if rank.energy_j is not None]
    return RequestTimes(
        total_duration_ms=repeat.total_duration_ms,
        stage_ms={
            **{stage.name: stage.duration_ms for stage in repeat.steps},
            "between_stages": repeat.between_stages_ms,
        },
        step_ms=statistics.median(repeat.later_steps_ms),
        overhead_share=overhead_share(repeat),
        nfe=evaluations // batches if cache is None else round(cache.computed),
        peak_memory_mib=[rank.peak_memory_mib for rank in ranks],
        first_step_ms=repeat.denoise_steps_ms[0].duration_ms if len(repeat.denoise_steps_ms) > 1 else None,
        energy_j=sum(energies) if energies else None,
    )


def write_grid(folder: Path, rows: Sequence[ImageRow]) -> None:
    """Write `grid.png` of images on disk; videos are left out.

    Args:
        folder: The run's folder.
        rows: The images of the grid.
    """
    from PIL import Image

    images = [row for row in rows if row.path.endswith(".png")]
    if images:
        pixels = [np.asarray(Image.open(folder / row.path).convert("RGB")) for row in images]
        grid(pixels, [row.prompt for row in images]).save(folder / "grid.png")
