"""The Python client: `with DiffusionGenerator.from_config("parallel=dp2") as generator: generator.generate(prompt="red
apple")`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from harness.client.build_record import build_record, measured
from harness.config.schema import RequestConfig, RunConfig
from harness.engines.pool import MakeEngine, new_engine
from harness.engines.protocol import Engine, OnProgress
from harness.messages import Array, EngineInfo, GenerationResult, Latents, array
from harness.records.media import grid, pixel_hash, save_mp4, save_png, still, to_uint8
from harness.records.record import FirstCall, Record, Repeat, SampleRow
from harness.resolve.compose import ResolvedRun, compose_run, to_yaml
from harness.resolve.request import to_message

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image


@dataclass(frozen=True)
class Generation:
    """The answer to one request: pictures or videos, timings of every rank, and the record.

    Args:
        pixels: pictures (3, height, width) or videos (frames, 3, height, width), float32 in [0, 1], in the request's
            order.
        result: the engine's answer, with each rank's stage and step times and memory.
        client_ms: what the client waited.
        fps: frames a second of a video.
        make_record: makes `record`.
        latents: of each picture, (1 or solver steps, *latent shape), where they were asked for.
    """

    pixels: list[Array]
    result: GenerationResult
    client_ms: float
    fps: int
    make_record: Callable[[], Record]
    latents: list[Array] = field(default_factory=list)

    @property
    def record(self) -> Record:
        """The row of this request, as a run of one repeat."""
        return self.make_record()

    @property
    def images(self) -> list[Image]:
        """The pictures as 8-bit PIL images; none where the answer holds videos."""
        from PIL import Image

        return [Image.fromarray(to_uint8(picture)) for picture in self.pixels if picture.ndim == 3]

    @property
    def videos(self) -> list[NDArray[np.uint8]]:
        """The videos as 8-bit frames (frames, height, width, 3); none where the answer holds pictures."""
        return [to_uint8(video) for video in self.pixels if video.ndim == 4]

    def grid(self) -> Image:
        """One sheet of all pictures, or of three frames of each video, with their prompts."""
        shown = [still(to_uint8(picture)) for picture in self.pixels]
        return grid(shown, [sample.prompt for sample in self.result.samples])

    def save(self, folder: Path, fingerprint: str) -> list[SampleRow]:
        """Writes `samples/*.png` or `samples/*.mp4`, and `grid.png`; the rows that name them."""
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        rows = []
        for sample, picture in zip(self.result.samples, (to_uint8(p) for p in self.pixels), strict=True):
            name = f"samples/{sample.index:04d}.{'png' if picture.ndim == 3 else 'mp4'}"
            row = SampleRow(name, sample.prompt, sample.seed, pixel_hash(picture))
            text = {"prompt": sample.prompt, "seed": str(sample.seed), "fingerprint": fingerprint}
            if picture.ndim == 3:
                save_png(folder / row.path, picture, text)
            else:
                save_mp4(folder / row.path, picture, self.fps, text)
            rows.append(row)
        self.grid().save(folder / "grid.png")
        return rows


class DiffusionGenerator:
    """A model on running ranks. Use it as a context manager: on leaving, every process it started has ended.

    Args:
        config: the resolved configuration.
        engine: the ranks.
        overrides: what the user wrote, for the record.
        notes: warnings of the configuration, for the record.
    """

    def __init__(
        self, config: RunConfig, engine: Engine, overrides: Sequence[str] = (), notes: Sequence[str] = ()
    ) -> None:
        self.config = config
        self.overrides = list(overrides)
        self.notes = list(notes)
        self.info: EngineInfo | None = None
        self.launch_ms = 0.0
        self._engine = engine
        self._stopped = False
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def from_config(cls, *overrides: str) -> DiffusionGenerator:
        """A generator from Hydra overrides, as on the command line: `from_config("model=emoji", "request.steps=8")`.

        Raises:
            ConfigError: overrides that cannot run; nothing has been started.
        """
        scratch = tempfile.TemporaryDirectory(prefix="triptych-run-")
        generator = cls.from_composed(compose_run(overrides), Path(scratch.name))
        generator._scratch = scratch
        return generator

    @classmethod
    def from_composed(
        cls, composed: ResolvedRun, folder: Path, make_engine: MakeEngine = new_engine
    ) -> DiffusionGenerator:
        """A generator whose ranks read `config.yaml` from `folder` and write their logs there.

        Args:
            composed: a checked configuration.
            folder: of the run.
            make_engine: makes its engine, or finds one that is warm.
        """
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(composed.config))
        engine = make_engine(composed.config, folder)
        return cls(composed.config, engine, composed.overrides, composed.notes)

    def start(self, on_wait: Callable[[EngineInfo | None], None] = lambda info: None) -> EngineInfo:
        """Starts the ranks and waits until they are ready (`with` does this too).

        Raises:
            EngineGone: a rank died while loading, or was not ready in time.
        """
        if self.info is not None:
            return self.info
        if self._stopped:
            raise RuntimeError("this generator was stopped; make a new one")
        began = time.perf_counter()
        self.info = self._engine.start(on_wait)
        self.launch_ms = (time.perf_counter() - began) * 1e3
        return self.info

    def stop(self) -> None:
        """Ends the ranks. Harmless when repeated."""
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
        samples_per_prompt: int | None = None,
        batch_size: int | None = None,
        latents: Latents = "none",
        count_flops: bool = False,
        profile: bool = False,
        on_progress: OnProgress = lambda progress: None,
    ) -> Generation:
        """Draws; what is not given is the configuration's `request`.

        `latents` asks for the final latent ("last") or the state after every step ("steps"); `count_flops` has the
        networks' operations counted, and `profile` their operators timed, which slows the request down.

        Raises:
            RequestFailed: the engine's typed answer, such as a size that the model cannot make.
            EngineGone: a rank died.
        """
        if self.info is None:
            raise RuntimeError(
                "the engine is not running; use `with DiffusionGenerator.from_config(...) as generator:`"
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
        asked = replace(self.config.request, **{key: value for key, value in given.items() if value is not None})
        began = time.perf_counter()
        message = msgspec.structs.replace(to_message(asked), latents=latents, count_flops=count_flops, profile=profile)
        result, parts = self._engine.generate(message, on_progress)
        client_ms = (time.perf_counter() - began) * 1e3
        pixels = [array(sample.pixels, parts) for sample in result.samples]
        states = [array(sample.latents, parts) for sample in result.samples if sample.latents is not None]
        repeats = [measured(result, client_ms)]
        fps = self.config.model.fps
        return Generation(
            pixels, result, client_ms, fps, lambda: self.record(asked, repeats, [result], [], pixels), states
        )

    def record(
        self,
        asked: RequestConfig,
        repeats: list[Repeat],
        results: list[GenerationResult],
        warmup_ms: list[float],
        pixels: list[Array],
        counted: GenerationResult | None = None,
        profiled: GenerationResult | None = None,
    ) -> Record:
        """The row of one or more measured requests; the last one's `pixels` are scored, `counted` has the operations of
        one, `profiled` the operators of one."""
        if self.info is None:
            raise RuntimeError("the engine is not running")
        first = FirstCall(self.launch_ms, self.info.load_ms, warmup_ms, self._engine.reused)
        config = replace(self.config, request=asked)
        return build_record(
            config,
            self.overrides,
            self.info,
            self._engine.environment,
            first,
            repeats,
            results,
            pixels,
            self.notes,
            counted,
            profiled,
        )
