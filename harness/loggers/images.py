"""The images of a data set in Weights & Biases while they are generated: one point for a batch of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from harness.config.schema import RunConfig, WandbConfig
from harness.config.yaml import to_dict
from harness.loggers.declared import used_config
from harness.loggers.run_names import wandb_id
from harness.loggers.series import define_axis
from harness.loggers.wandb import connected_mode, open_run
from harness.records.images import ImageRow

if TYPE_CHECKING:
    import wandb

BATCH = 100  # images of one point
SHOWN = 8  # images of a batch that are mirrored


class ImageMirror:
    """A context in which the images of a stream are logged in batches, if anything is logged.

    An error of wandb ends the mirror and not the run. The record is logged to the same wandb run at the end.

    Args:
        config: The `logger.wandb` group.
        folder: The run's folder.
        run: The configuration.
        total: Number of images.

    Attributes:
        error: What wandb did not take; None if it took everything.
    """

    def __init__(self, config: WandbConfig, folder: Path, run: RunConfig, total: int) -> None:
        self.error: str | None = None
        self._config = config
        self._folder = folder
        self._declared = used_config(to_dict(run))
        self._total = total
        self._run: wandb.Run | None = None
        self._batch: list[ImageRow] = []
        self._logged = 0
        self._began = time.perf_counter()
        self._off = total <= BATCH

    def __enter__(self) -> ImageMirror:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run is not None:
            self._guarded(exit_code=0 if error is None else 1)

    def add(self, rows: Sequence[ImageRow]) -> None:
        """Add images that are on disk."""
        self._batch += rows
        if len(self._batch) >= BATCH:
            self._guarded()
            self._batch = []

    def _guarded(self, exit_code: int | None = None) -> None:
        """Log the batch, or end the run if a code is given; the first error turns the mirror off."""
        if self._off:
            return
        try:
            if exit_code is not None and self._run is not None:
                self._run.finish(exit_code=exit_code)
            else:
                self._log()
        except Exception as error:
            self._off, self.error = True, " ".join(str(error).split()) or type(error).__name__

    def _log(self) -> None:
        if self._run is None:
            mode = connected_mode(self._config.mode)
            if mode == "disabled":
                self._off = True
                return
            run_id = wandb_id(self._folder)
            self._run = open_run(self._config, mode, self._folder, "generate", self._declared, run_id=run_id)
            define_axis(self._run, "images", ["share", "images_per_s", "image_ms", "batch"])
        import wandb

        self._logged += len(self._batch)
        shown = self._batch[:: -(-len(self._batch) // SHOWN)]
        images = [wandb.Image(str(self._folder / row.path), caption=row.prompt) for row in shown if _is_image(row)]
        self._run.log(
            {
                "images": self._logged,
                "share": self._logged / self._total,
                "images_per_s": self._logged / (time.perf_counter() - self._began),
                "image_ms": sum(row.duration_ms for row in self._batch) / len(self._batch),
                **({"batch": images} if images else {}),
            }
        )


def _is_image(row: ImageRow) -> bool:
    return row.path.endswith(".png")
