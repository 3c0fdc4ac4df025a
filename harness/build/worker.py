"""From a configuration to a worker: device, components, noise scheduler, stages. The one place that joins them."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from datetime import timedelta

import torch

from harness.build.common import source_of
from harness.build.native import LoadedNetworks, load_networks, native_pipeline, replay_support
from harness.config.schema import RunConfig
from harness.config.tasks import TRAITS
from harness.device.cuda import CudaEnergy, CudaMemory, synchronizer
from harness.device.device import denoiser_dtype, prepare_cuda, torch_dtype
from harness.device.energy import EnergyMeter, NoEnergy, PackageEnergy
from harness.device.flops import ceiling_tflops
from harness.device.memory import MemoryMeter, ResidentMemory
from harness.messages import LoadedComponent
from harness.optimize.apply import ReplaySupport
from harness.optimize.operator_check import OperatorCheck
from harness.optimize.upcast import should_upcast
from harness.parallel.mesh import RankPosition
from harness.parallel.process_groups import ProcessGroups, make_process_groups, single_rank_groups
from harness.pipeline.composed import ComposedPipeline
from harness.resolve.engine_key import weights_key
from harness.resolve.engines_table import NATIVE
from harness.resolve.run import ResolvedRun
from harness.serving.worker import Worker


def measure_ceiling(config: RunConfig, device: torch.device) -> float:
    """Measure the rate of a matrix product on this rank, in the dtype in which the denoiser's products are computed.

    Args:
        config: the resolved configuration.
        device: the device that computes.

    Returns:
        The rate, TFLOP/s; 0 if the task measures nothing.
    """
    if not TRAITS[config.task.name].measures:
        return 0.0
    dtype = torch_dtype(denoiser_dtype(config.model))
    return ceiling_tflops(device, torch.float32 if should_upcast(device, dtype) else dtype, synchronizer(device))


class WorkerBuilder:
    """Builds the worker of one rank, and later changes it, in place, to other runs with an equal `process_key`.

    Networks stay loaded as long as the runs have an equal `weights_key`; otherwise they are freed before others are
    loaded (harness.resolve.engine_key).

    Args:
        position: this rank's position on the mesh.
        device: the device that computes.

    Attributes:
        checked_ms: the part of the last build that compared operators with float64, ms.
    """

    def __init__(self, position: RankPosition, device: torch.device) -> None:
        self.checked_ms = 0.0
        self._position = position
        self._device = device
        self._worker: Worker | None = None
        self._groups: ProcessGroups | None = None
        self._networks: LoadedNetworks | None = None
        self._networks_key: tuple[str, ReplaySupport | None] | None = None

    def build(self, run: ResolvedRun) -> Worker:
        """Return the worker of a run: a new one, or the one of the last run, changed.

        Args:
            run: the resolved run.

        Returns:
            The worker.

        Raises:
            CheckpointError: if weights are missing, broken or do not fit. The worker cannot run any more.
            ValueError: if settings do not go together.
        """
        key, self.checked_ms = self._key(run), 0.0
        if self._worker is not None and self._networks is not None and key == self._networks_key:
            self._worker.pipeline = native_pipeline(run, self._networks)
            return self._worker
        self._unload()
        if self._device.type == "cuda":
            prepare_cuda(self._device)
        source, task = source_of(run, self._device), run.config.task
        operators = OperatorCheck(self._device, enabled=TRAITS[task.name].measures and task.fidelity)
        if run.config.engine.name == NATIVE:
            groups = self._native_groups(run)
            self._networks, self._networks_key = load_networks(run, source, groups, operators), key
            pipeline = native_pipeline(run, self._networks)
        else:
            from harness.build.baseline import baseline_pipeline  # imports diffusers' pipelines

            pipeline, groups = baseline_pipeline(run, source), single_rank_groups()
        worker = self._worker = self._worker or self._new_worker(pipeline)
        worker.memory.release()  # free what loading needed
        worker.pipeline, worker.groups, worker.operators = pipeline, groups, operators
        worker.loaded = [
            LoadedComponent(p.component, str(p.path), p.dtype, p.parameters, p.bytes, p.load_ms, p.merged, p.read_bytes)
            for p in source.loaded.values()
        ]
        self.checked_ms = operators.duration_ms
        return worker

    def _key(self, run: ResolvedRun) -> tuple[str, ReplaySupport | None]:
        """Return what loaded networks can serve; a network with a block cache is not recorded in CUDA graphs."""
        config, on_gpu = run.config, self._device.type == "cuda"
        return weights_key(config), replay_support(config, self._native_groups(run)) if on_gpu else None

    def _native_groups(self, run: ResolvedRun) -> ProcessGroups:
        """Return this rank's groups, made before anything is loaded, whose time may differ between ranks."""
        if self._groups is None:
            timeout = timedelta(seconds=run.config.launch.collective_timeout_s)
            self._groups = make_process_groups(self._position, self._device, timeout)
        return self._groups

    def _new_worker(self, pipeline: ComposedPipeline) -> Worker:
        cuda = self._device.type == "cuda"
        memory: MemoryMeter = CudaMemory(self._device) if cuda else ResidentMemory()
        return Worker(pipeline, self._position, self._device, memory, energy=energy_meter(self._device))

    def _unload(self) -> None:
        """Free the networks of the last run."""
        self._networks = None
        if self._worker is None:
            return
        del self._worker.pipeline
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # it keeps what it compiled for them
        gc.collect()
        self._worker.memory.release()


def build_worker(run: ResolvedRun, position: RankPosition, device: torch.device) -> Worker:
    """Load the components on the device, and build the pipeline.

    Args:
        run: the resolved run.
        position: this rank's position on the mesh.
        device: the device that computes.

    Returns:
        The worker.

    Raises:
        CheckpointError: if weights are missing, broken or do not fit.
        ValueError: if settings do not go together.
    """
    return WorkerBuilder(position, device).build(run)


def energy_meter(device: torch.device) -> EnergyMeter:
    """Return the meter of a GPU if NVML is installed, or that of the machine's processors on its first rank."""
    if device.type == "cuda":
        return CudaEnergy(device) if importlib.util.find_spec("pynvml") else NoEnergy()
    return PackageEnergy() if os.environ.get("LOCAL_RANK", "0") == "0" else NoEnergy()
