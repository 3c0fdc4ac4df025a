"""Loading on the ranks of an engine: the first run's part, and later those of other runs in its place."""

from __future__ import annotations

import os
import socket
import time

import msgspec
import torch
import yaml

from harness.build.native import attention_name
from harness.build.worker import WorkerBuilder, measure_ceiling
from harness.config.schema import DType
from harness.config.yaml import ConfigError, from_yaml
from harness.device.device import denoiser_dtype, prepare_cpu
from harness.loggers.level import set_log_level
from harness.messages import EngineInfo, LoadedComponent
from harness.parallel.collectives import Collectives
from harness.parallel.mesh import RankPosition
from harness.resolve.engine_key import weights_key
from harness.resolve.run import ResolvedRun
from harness.serving.faults import failure_line
from harness.serving.worker import Worker

CONFIG_ERRORS = (ValueError, TypeError, RecursionError, msgspec.MsgspecError, yaml.YAMLError)


class RankInfo(msgspec.Struct, frozen=True):
    """What a rank reports once it has loaded."""

    pid: int
    load_ms: float
    loaded: list[LoadedComponent] = []
    ceiling_tflops: float = 0.0
    node: int = 0
    host: str = ""


class RankLoader:
    """Loads this rank's part of a run, at the same time as the other ranks.

    Args:
        position: this rank's position on the mesh.
        device: the device that computes.
        collectives: the collectives over all ranks.
        info: what is known of the engine before it has loaded.
        node: the number of this rank's torchrun agent.
    """

    def __init__(
        self,
        position: RankPosition,
        device: torch.device,
        collectives: Collectives,
        info: EngineInfo,
        node: int = 0,
    ) -> None:
        self._position = position
        self._device = device
        self._collectives = collectives
        self._info = info
        self._node = node
        self._builder = WorkerBuilder(position, device)
        self._ceilings: dict[tuple[bool, DType], float] = {}
        self._worker: Worker | None = None

    @property
    def worker(self) -> Worker:
        """The worker of the last run that was loaded; the same object for every run."""
        if self._worker is None:
            raise RuntimeError("nothing is loaded; call load() first")
        return self._worker

    def read(self, text: str) -> ResolvedRun:
        """Return the run of a configuration, which its sender has checked.

        Args:
            text: the resolved configuration, as `config.yaml` has it.

        Returns:
            The run.

        Raises:
            ConfigError: the text is no configuration, or one with another layout.
        """
        try:
            run = ResolvedRun(from_yaml(text))
            weights_key(run.config)  # refuses one without a denoiser
        except CONFIG_ERRORS as error:
            raise ConfigError(f"not a configuration of this engine ({failure_line(error)})") from error
        if tuple(run.degrees) != tuple(self._position.degrees):
            raise ConfigError(f"a layout of {run.world_size} ranks needs ranks of its own, not these")
        return run

    def load(self, run: ResolvedRun) -> EngineInfo:
        """Load this rank's part of a run, in place of an earlier one; all ranks call it at the same time.

        Args:
            run: the resolved run.

        Returns:
            What is known of the engine, on rank 0 with what all ranks reported.

        Raises:
            CheckpointError: if weights are missing, broken or do not fit. This rank cannot run any more.
            ValueError: if settings do not go together.
        """
        config = run.config
        start = time.perf_counter()
        set_log_level(config.logger)
        prepare_cpu(config, self._info.threads)
        worker = self._worker = self._builder.build(run)
        load_ms = (time.perf_counter() - start) * 1e3 - self._builder.checked_ms
        self._collectives.gather([])  # all ranks have loaded, so that all measure at the same time
        own = RankInfo(os.getpid(), load_ms, worker.loaded, self._ceiling(run), self._node, socket.gethostname())
        gathered = self._collectives.gather([msgspec.msgpack.encode(own)])
        ranks = [msgspec.msgpack.decode(frames[0], type=RankInfo) for frames in gathered]
        info = msgspec.structs.replace(self._info, attention=attention_name(run, self._device))
        if not ranks:
            return info
        return msgspec.structs.replace(
            info,
            pids=[rank.pid for rank in ranks],
            load_ms=max(rank.load_ms for rank in ranks),
            loaded=slowest_load_times([rank.loaded for rank in ranks]),
            ceiling_tflops=[rank.ceiling_tflops for rank in ranks],
            hosts=list({rank.node: rank.host for rank in ranks}.values()),
        )

    def _ceiling(self, run: ResolvedRun) -> float:
        """Return the rate of a matrix product on this rank, measured once for each dtype."""
        key = (run.config.launch.reproducible, denoiser_dtype(run.config.model))
        if key not in self._ceilings:
            self._ceilings[key] = measure_ceiling(run.config, self._device)
        return self._ceilings[key]


def slowest_load_times(ranks: list[list[LoadedComponent]]) -> list[LoadedComponent]:
    """Return rank 0's components, each with the loading time of the slowest rank."""
    times: dict[str, float] = {}
    for part in (part for rank in ranks for part in rank):
        times[part.component] = max(part.load_ms, times.get(part.component, 0.0))
    return [msgspec.structs.replace(part, load_ms=times[part.component]) for part in ranks[0]]
