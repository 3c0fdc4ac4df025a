"""A resolved run: the checked configuration, and everything that follows from it, each decided once.

The launcher has it from harness.resolve.compose. A rank makes its own from the run's config.yaml, once, as it starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.config.schema import RunConfig
from harness.datasets.dataset import Dataset
from harness.parallel.mesh import degrees, world_size
from harness.plugins.options import own_options
from harness.resolve.checkpoint import CheckpointLayout, locate
from harness.resolve.checkpoint_defaults import PUBLISHED_FAMILY, denoiser_defaults
from harness.resolve.dataset import streamed_dataset
from harness.resolve.engines_table import NATIVE, baseline_attention
from harness.resolve.layout import model_shape
from harness.resolve.layout_rules import ModelShape, needs_lse
from harness.resolve.scheduler import noise_scheduler_settings
from harness.resolve.search_path import SearchPath
from models.registry import ATTENTION_BACKENDS, resolve_backend
from schedulers.settings import NoiseSchedulerSettings


@dataclass(frozen=True)
class AttentionChoice:
    """The attention kernel of a run.

    Attributes:
        requested: Backend in the configuration, which may be auto.
        with_lse: Whether the kernel has to return the log-sum-exp of its scores.
        in_baseline: Name of the backend in a baseline engine; None in the native one.
        options: Options of the backend, by name.
    """

    requested: str
    with_lse: bool
    in_baseline: str | None
    options: dict[str, Any]

    def backend(self, device_type: str) -> str:
        """Return the name of the native backend on a type of device, such as cuda."""
        return resolve_backend(self.requested, device_type, self.with_lse)


@dataclass(frozen=True)
class ResolvedRun:
    """A composed and checked run.

    What is not given here is decided when it is first used, and kept. A run that trains or reports has no checkpoint.

    Attributes:
        config: The checked configuration: engine, optimisation and cache included, none of them auto or null.
        overrides: The overrides that the user gave.
        folder: The run's folder, as Hydra names it.
        notes: Warnings for the user.
        retry: Whether the folder of a run that did not end well may be used again.
        fetch: Whether files of a hub checkpoint that are not in the local cache are downloaded.
        search: Search path of the configurations.
    """

    config: RunConfig
    overrides: list[str] = field(default_factory=list)
    folder: Path = Path()
    notes: list[str] = field(default_factory=list)
    retry: bool = False
    fetch: bool = False
    search: SearchPath = field(default_factory=SearchPath)

    @cached_property
    def denoiser(self) -> str:
        """The folder of the denoiser in the checkpoint."""
        return denoiser_defaults(self.config).weights

    @cached_property
    def checkpoint(self) -> CheckpointLayout:
        """The place of each component on disk."""
        return locate(self.config.model, self.denoiser, self.fetch)

    @cached_property
    def noise_scheduler(self) -> NoiseSchedulerSettings | None:
        """The settings of the noise scheduler; None for the checkpoint's own."""
        scheduler = self.config.scheduler
        return None if scheduler.family == PUBLISHED_FAMILY else noise_scheduler_settings(scheduler, self.config.plugin)

    @cached_property
    def dataset(self) -> Dataset | None:
        """The data set that the run generates image by image; None if it makes one request."""
        return streamed_dataset(self.config)

    @cached_property
    def attention(self) -> AttentionChoice:
        """The attention kernel."""
        config = self.config
        other = None if config.engine.name == NATIVE else baseline_attention(config)
        backend = config.attention.backend
        options = own_options(ATTENTION_BACKENDS, backend, config.plugin) if backend in ATTENTION_BACKENDS else {}
        return AttentionChoice(backend, needs_lse(config.parallel), other, options)

    @cached_property
    def shape(self) -> ModelShape:
        """The sizes of the network and of the run's own request."""
        return model_shape(self.config, self.checkpoint.config_folder(self.denoiser))

    @cached_property
    def degrees(self) -> tuple[int, ...]:
        """The sizes of the mesh's axes."""
        return degrees(self.config.parallel)

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return world_size(self.degrees)

    @property
    def replica_size(self) -> int:
        """The number of ranks that compute one image together."""
        return world_size(self.degrees[1:])
