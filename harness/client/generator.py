"""The Python client: a model on running ranks, used as a context manager.

with DiffusionGenerator.from_config("parallel=dp2") as generator:
    generation = generator.generate(prompt="red apple")
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from harness.client.build_record import base_record, build_record, make_repeat
from harness.client.trace import merge_traces
from harness.config.schema import RequestConfig
from harness.device.usage import MachineUsage
from harness.engines.pool import MakeEngine, new_engine
from harness.engines.protocol import Engine, OnProgress
from harness.messages import Array, EngineInfo, GenerationResult, Latents, array
from harness.records.media import grid, pixel_hash, save_mp4, save_png, still, to_uint8
from harness.records.provenance import Beginning
from harness.records.record import FirstCall, Record, Repeat, SampleRow
from harness.resolve.command import parse_command
from harness.resolve.compose import ResolvedRun, compose_run, to_yaml
from harness.resolve.request import to_message

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image


@dataclass(frozen=True)
class Generation:
    """The answer to one request: images or videos, timings of every rank, and the record.

    Args:
        pixels: images (3, height, width) or videos (frames, 3, height, width), float32 in [0, 1], in the request's
            order.
        result: the engine's answer, with each rank's stage and step times and memory.
        client_ms: the time that the client waited, ms.
        fps: the frames per second of a video.
        make_record: the function that builds `record`.
        latents: the latents of each sample, (1 or solver steps, *latent shape), if the request asked for them.
        repeat: the answer as a repeat of a measurement.
    """

    pixels: list[Array]
    result: GenerationResult
    client_ms: float
    fps: int
    make_record: Callable[[], Record]
    repeat: Repeat
    latents: list[Array] = field(default_factory=list)

    @property
    def record(self) -> Record:
        """The record of this request, as a run with one repeat."""
        return self.make_record()

    @property
    def images(self) -> list[Image]:
        """The images as 8-bit PIL images; empty if the answer holds videos."""
        from PIL import Image

        return [Image.fromarray(to_uint8(image)) for image in self.pixels if image.ndim == 3]

    @property
    def videos(self) -> list[NDArray[np.uint8]]:
        """The videos as 8-bit frames (frames, height, width, 3); empty if the answer holds images."""
        return [to_uint8(video) for video in self.pixels if video.ndim == 4]

    def grid(self) -> Image:
        """Return one sheet of all images, or of three frames of each video, with their prompts."""
        stills = [still(to_uint8(sample)) for sample in self.pixels]
        return grid(stills, [sample.prompt for sample in self.result.samples])

    def trace(self) -> bytes:
        """Return the trace of all ranks as a Chrome trace, compressed with gzip: the content of `trace.json.gz`.

        Raises:
            ValueError: the request was not traced.
        """
        return merge_traces(self.result.ranks)

    def save(self, folder: Path, fingerprint: str) -> list[SampleRow]:
        """Write `samples/*.png` or `samples/*.mp4`, and `grid.png`.

        Args:
            folder: the folder to write to; it exists.
            fingerprint: the run's fingerprint, stored in each file.

        Returns:
            One row per sample, with its path and hash.
        """
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        rows = []
        for sample in self.result.samples:
            rows.append(self.save_sample(sample.index, folder, fingerprint, f"{sample.index:04d}"))
        self.grid().save(folder / "grid.png")
        return rows

    def save_sample(self, index: int, folder: Path, fingerprint: str, name: str) -> SampleRow:
        """Write one image or video to `samples/`.

        Args:
            index: the number of the sample in the answer.
            folder: the folder that has `samples/`.
            fingerprint: the run's fingerprint, stored in the file.
            name: the name of the file, without a suffix.

        Returns:
            Its row, with its path and hash.
        """
        sample, pixels = self.result.samples[index], to_uint8(self.pixels[index])
        path = f"samples/{name}.{'png' if pixels.ndim == 3 else 'mp4'}"
        text = {"prompt": sample.prompt, "seed": str(sample.seed), "fingerprint": fingerprint}
        if pixels.ndim == 3:
            save_png(folder / path, pixels, text)
        else:
            save_mp4(folder / path, pixels, self.fps, text)
        return SampleRow(path, sample.prompt, sample.seed, pixel_hash(pixels))


class DiffusionGenerator:
    """A model on running ranks. Use it as a context manager: on exit, every process that it started has ended.

    Args:
        run: the resolved run.
        engine: the engine that runs the ranks.
    """

    def __init__(self, run: ResolvedRun, engine: Engine) -> None:
        self.config = run.config
        self.info: EngineInfo | None = None
        self.launch_ms = 0.0
        self._run = run
        self._engine = engine
        self._beginning = Beginning.now()
        self._stopped = False
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def from_config(
        cls,
        *overrides: str,
        config_dir: str | Path | None = None,
        plugins: Sequence[str] = (),
        engines: MakeEngine = new_engine,
    ) -> DiffusionGenerator:
        """Return a generator for Hydra overrides, as on the command line.

            DiffusionGenerator.from_config("model=emoji", "request.steps=8", plugins=["my_solver.py"])

        With a pool, the next generator changes the ranks of the last one in place of starting others:

            with EnginePool() as pool:
                for solver in ("euler", "heun"):
                    with DiffusionGenerator.from_config(f"scheduler/solver={solver}", engines=pool.engine) as generator:
                        ...

        Args:
            *overrides: the overrides; from=FOLDER among them stands for those of the run in that folder.
            config_dir: a folder of your own configurations, as after --config-dir.
            plugins: modules or files of plug-ins, as the key `plugins` has them.
            engines: a function that makes the engine; `EnginePool.engine` returns a warm one.

        Raises:
            ConfigError: overrides that cannot run; nothing has been started.
        """
        named = [f"plugins={json.dumps([*plugins], ensure_ascii=False)}"] if plugins else []
        command = parse_command([*named, *overrides], config_dir).without_flags("DiffusionGenerator")
        run = compose_run(command.overrides, command.search)
        scratch = tempfile.TemporaryDirectory(prefix="triptych-run-")
        generator = cls.from_resolved(run, Path(scratch.name), engines)
        if engines is new_engine:
            generator._scratch = scratch
        else:  # ranks that stay warm write their logs there
            weakref.finalize(generator._engine, scratch.cleanup)
        return generator

    @classmethod
    def from_record(cls, folder: str | Path, *overrides: str) -> DiffusionGenerator:
        """Return a generator with the configuration of an earlier run.

        Args:
            folder: the run's folder, with its record.
            *overrides: overrides, which have the last word.

        Raises:
            ConfigError: the folder holds no record, or the overrides cannot run; nothing has been started.
        """
        return cls.from_config(f"from={folder}", *overrides)

    @classmethod
    def from_resolved(
        cls, resolved: ResolvedRun, folder: Path, make_engine: MakeEngine = new_engine
    ) -> DiffusionGenerator:
        """Return a generator whose ranks read `config.yaml` from `folder` and write their logs there.

        Args:
            resolved: a checked configuration.
            folder: the run's folder, created if missing.
            make_engine: a function that makes the engine, or returns a warm one.
        """
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(resolved.config))
        return cls(resolved, make_engine(resolved.config, folder))

    def start(self, on_wait: Callable[[EngineInfo | None], None] = lambda info: None) -> EngineInfo:
        """Start the ranks and wait until they are ready (`with` does this too).

        Args:
            on_wait: a callback that receives the engine's state while it loads.

        Returns:
            The engine's state.

        Raises:
            EngineGone: a rank died while loading, or was not ready in time.
            RuntimeError: this generator was stopped.
        """
        if self.info is not None:
            return self.info
        if self._stopped:
            raise RuntimeError("this generator was stopped; make a new one")
        start = time.perf_counter()
        self.info = self._engine.start(on_wait)
        self.launch_ms = (time.perf_counter() - start) * 1e3
        return self.info

    def stop(self) -> None:
        """End the ranks. A second call does nothing."""
        self.info = None
        self._stopped = True
        self._engine.stop()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def __enter__(self) -> DiffusionGenerator:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def generate(
        self,
        prompt: str | None = None,
        *,
        prompts: list[str] | None = None,
        negative_prompt: str | None = None,
        seed: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        seeds: list[int] | None = None,
        samples_per_prompt: int | None = None,
        batch_size: int | None = None,
        latents: Latents = "none",
        count_flops: bool = False,
        profile: bool = False,
        trace: bool = False,
        on_progress: OnProgress = lambda progress: None,
    ) -> Generation:
        """Generate images or videos; an argument that is not given is taken from the configuration's `request`.

        Args:
            prompt: a single prompt.
            prompts: several prompts, instead of `prompt`.
            negative_prompt: the negative prompt.
            seed: the seed of the first sample.
            steps: the number of solver steps.
            guidance: the guidance scale; 1 means no guidance.
            height: the height in pixels.
            width: the width in pixels.
            frames: the number of video frames.
            seeds: the seed of each prompt's first sample, instead of `seed`.
            samples_per_prompt: the number of samples of each prompt.
            batch_size: the number of samples in one network forward.
            latents: the latents to return: "none", the final latent ("last"), or the state after every step ("steps").
            count_flops: whether to count the networks' operations, which slows the request down.
            profile: whether to time the networks' operators, which slows the request down.
            trace: whether to trace the request on every rank (`Generation.trace`), which slows it down.
            on_progress: a callback that receives the progress of rank 0.

        Returns:
            The samples, their timings and the record.

        Raises:
            RequestFailed: the engine's typed answer, such as a size that the model cannot generate.
            EngineGone: a rank died.
            RuntimeError: the ranks are not running.
            ValueError: no prompt is given, and the configuration names a data set.
        """
        if self.info is None:
            raise RuntimeError(
                "the engine is not running; use `with DiffusionGenerator.from_config(...) as generator:`"
            )
        if prompt is None and prompts is None and self._run.dataset is not None:
            raise ValueError(
                "a data set is generated by the command (python -m harness); from Python, give its prompts: "
                "generate(prompts=[...], seeds=[...]), as harness.datasets.dataset.load_dataset reads them"
            )
        given: dict[str, Any] = {
            "prompts": [prompt] if prompt is not None else prompts,
            "negative_prompt": negative_prompt,
            "seed": seed,
            "steps": steps,
            "guidance": guidance,
            "height": height,
            "width": width,
            "frames": frames,
            "samples_per_prompt": samples_per_prompt,
            "batch_size": batch_size,
        }
        request = replace(self.config.request, **{key: value for key, value in given.items() if value is not None})
        before, start = MachineUsage.now(), time.perf_counter()
        message = msgspec.structs.replace(
            to_message(request),
            latents=latents,
            count_flops=count_flops,
            profile=profile,
            trace_from_ns=time.time_ns() if trace else None,
            seeds=seeds or [],
        )
        result, parts = self._engine.generate(message, on_progress)
        client_ms = (time.perf_counter() - start) * 1e3
        watched = MachineUsage.now().since(before)
        if os.getpid() in self.info.pids:  # this process is a rank, and counts as one
            watched = watched._replace(client_s=0.0)
        pixels = [array(sample.pixels, parts) for sample in result.samples]
        latent_states = [array(sample.latents, parts) for sample in result.samples if sample.latents is not None]
        repeat, fps = make_repeat(result, client_ms, watched, len(self.info.hosts)), self.config.model.fps

        def make_record() -> Record:
            return self.record(request, [repeat], [result], [], pixels)

        return Generation(pixels, result, client_ms, fps, make_record, repeat, latent_states)

    def base_record(self) -> Record:
        """Return the record of the running ranks before anything is measured.

        Raises:
            RuntimeError: the ranks are not running.
        """
        if self.info is None:
            raise RuntimeError("the engine is not running")
        first = FirstCall(self.launch_ms, self.info.load_ms, [], self._engine.reused)
        return base_record(self._run, self.info, self._engine.environment, first, self._beginning)

    def record(
        self,
        request: RequestConfig,
        repeats: list[Repeat],
        results: list[GenerationResult],
        warmup_ms: list[float],
        pixels: list[Array],
        flops_result: GenerationResult | None = None,
        profile_result: GenerationResult | None = None,
    ) -> Record:
        """Return the record of one or more measured repeats of a request.

        Args:
            request: the request.
            repeats: the times of each repeat.
            results: the answer of each repeat.
            warmup_ms: the times of the warm-up requests, ms.
            pixels: the samples of the last answer, which are scored.
            flops_result: an answer whose operations were counted.
            profile_result: an answer whose operators were timed.

        Raises:
            RuntimeError: the ranks are not running.
        """
        if self.info is None:
            raise RuntimeError("the engine is not running")
        first = FirstCall(self.launch_ms, self.info.load_ms, warmup_ms, self._engine.reused)
        return build_record(
            self._run,
            request,
            self.info,
            self._engine.environment,
            first,
            repeats,
            results,
            pixels,
            flops_result,
            profile_result,
            self._beginning,
        )
