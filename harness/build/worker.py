"""From a configuration to a worker: device, components, noise scheduler, stages. The one place that joins them."""

from __future__ import annotations

import importlib.util
import os

import torch

from harness.build.common import source_of
from harness.build.native import native_pipeline
from harness.config.schema import RunConfig
from harness.config.tasks import TRAITS
from harness.device.cuda import CudaEnergy, CudaMemory, synchronizer
from harness.device.device import denoiser_dtype, prepare_cuda, torch_dtype
from harness.device.energy import EnergyMeter, NoEnergy, PackageEnergy
from harness.device.flops import ceiling_tflops
from harness.device.memory import MemoryMeter, ResidentMemory
from harness.messages import LoadedComponent
from harness.optimize.operator_check import OperatorCheck
from harness.optimize.upcast import should_upcast
from harness.parallel.mesh import RankPosition
from harness.parallel.process_groups import single_rank_groups
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
    if device.type == "cuda":
        prepare_cuda(device)
    source = source_of(run, device)
    task = run.config.task
    operators = OperatorCheck(device, enabled=TRAITS[task.name].measures and task.fidelity)
    if run.config.engine.name == NATIVE:
        pipeline, groups = native_pipeline(run, source, position, operators)
    else:
        from harness.build.baseline import baseline_pipeline  # imports diffusers' pipelines

        pipeline, groups = baseline_pipeline(run, source), single_rank_groups()
    memory: MemoryMeter = CudaMemory(device) if device.type == "cuda" else ResidentMemory()
    memory.release()  # free what loading needed
    energy = energy_meter(device)
    loaded = [
        LoadedComponent(p.component, str(p.path), p.dtype, p.parameters, p.bytes, p.load_ms, p.merged, p.read_bytes)
        for p in source.loaded.values()
    ]
    return Worker(pipeline, position, device, memory, loaded, groups, energy, operators)


def energy_meter(device: torch.device) -> EnergyMeter:
    """Return the meter of a GPU if NVML is installed, or that of the machine's processors on its first rank."""
    if device.type == "cuda":
        return CudaEnergy(device) if importlib.util.find_spec("pynvml") else NoEnergy()
    return PackageEnergy() if os.environ.get("LOCAL_RANK", "0") == "0" else NoEnergy()
